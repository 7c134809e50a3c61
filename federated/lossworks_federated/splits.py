"""Splits of labelled examples over clients, and how unlike each other the clients are.

N examples, M clients, K classes. Everything is a function of labels, spec and seed.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks_federated.spec_parts import SplitSpec

_ORDER, _SIZES, _TESTS, _FEATURES = range(4)  # what a random stream is for


@dataclass(frozen=True, eq=False)
class Split:
    """Which examples each client has; clients are named by their partition, from 0.

    Attributes:
        train: Rows that clients train on, int64, one array a client.
        test: Rows that clients keep for their own tests; empty arrays where there are none.
        counts: Examples of each class that each client has, train and test, int64 (M, K).
        moved: Examples that went to other clients than drawn, to give each its least.
        left_out: Names of owners that are no clients, since they have fewer examples than the least.
    """

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    counts: np.ndarray
    moved: int
    left_out: tuple[str, ...] = ()

    def pooled(self) -> "Split":
        """Return the split in which the first client trains on what all of them have; tests stay."""
        empty = np.zeros(0, dtype=np.int64)
        train = (np.concatenate(self.train), *[empty] * (len(self.train) - 1))
        return replace(self, train=train)

    def heterogeneity(self) -> dict[str, float]:
        """Return how the clients differ.

        Returns:
            ``label_entropy``: mean over clients of −Σ p log p of their labels, in nats; ``label_distance``:
            mean total variation distance ½ Σ |p_client − p_all|, which is the earth mover's distance between
            classes that are all 1 apart; ``classes``: mean number of classes a client has;
            ``effective_clients``: (Σ n)²/Σ n²; ``largest`` and ``smallest`` size.
        """
        sizes = self.counts.sum(1)
        own = self.counts / sizes[:, None]
        everyone = self.counts.sum(0) / sizes.sum()
        logs = np.log(own, where=own > 0, out=np.zeros_like(own))
        return {
            "label_entropy": float(-(own * logs).sum(1).mean()),
            "label_distance": float(0.5 * np.abs(own - everyone).sum(1).mean()),
            "classes": float((self.counts > 0).sum(1).mean()),
            "effective_clients": float(sizes.sum()) ** 2 / float((sizes.astype(float) ** 2).sum()),
            "largest": float(sizes.max()),
            "smallest": float(sizes.min()),
        }


def split_examples(labels: np.ndarray, spec: SplitSpec, seed: int, owners: np.ndarray | None = None) -> Split:
    """Return a split of examples.

    Args:
        labels: Shape (N,), int64 in [0, K).
        spec: How.
        seed: Of all draws.
        owners: Whom each example belongs to, shape (N,), for ``kind=natural``.

    Raises:
        UserError: There are too few examples, or owners, for the clients.
    """
    need = spec.clients * spec.min_size
    if len(labels) < need:
        raise UserError(
            f"split.clients={spec.clients} with split.min_size={spec.min_size} need {need} examples; "
            f"there are {len(labels)}"
        )
    # Partitioners cut classes and sizes in the order they find.
    shuffled = np.random.default_rng([seed, _ORDER]).permutation(len(labels))
    left_out: tuple[str, ...] = ()
    moved = 0
    if spec.kind == "natural":
        parts, left_out = _by_owner(owners, spec.clients, spec.min_size)
    else:
        drawn = [shuffled[rows] for rows in _partition(labels[shuffled], spec, seed)]
        parts, moved = _with_least(drawn, spec.min_size)
    classes = int(labels.max()) + 1
    counts = np.stack([np.bincount(labels[rows], minlength=classes) for rows in parts])
    stream = np.random.default_rng([seed, _TESTS])
    train, test = zip(*(_cut(stream.permutation(rows), spec.test_fraction) for rows in parts), strict=True)
    return Split(train, test, counts, moved, left_out)


def with_feature_noise(inputs: Tensor, split: Split, variance: float, seed: int) -> Tensor:
    """Return inputs (N, …) with Gaussian noise of variance σ·i/M on those of client i."""
    if not variance:
        return inputs
    noisy, clients = inputs.clone(), len(split.train)
    for client in range(clients):
        rows = torch.from_numpy(np.concatenate((split.train[client], split.test[client])))
        g = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, _FEATURES, client]).generate_state(1)[0])
        )
        deviation = (variance * client / clients) ** 0.5
        noisy[rows] += deviation * torch.randn(inputs[rows].shape, generator=g)
    return noisy


def _partition(labels: np.ndarray, spec: SplitSpec, seed: int) -> list[np.ndarray]:
    """Return all rows by client; some may have none."""
    if spec.kind == "quantity":  # flwr-datasets has no sizes of 0
        shares = np.random.default_rng([seed, _SIZES]).dirichlet(np.full(spec.clients, spec.alpha))
        return np.split(np.arange(len(labels)), np.round(np.cumsum(shares)[:-1] * len(labels)).astype(int))
    if spec.kind == "shards":
        return _shards(labels, spec, seed)
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    m = spec.clients
    # Its own rule for a least size draws everything anew, in vain for many clients; ours is _with_least.
    drawn = DirichletPartitioner(m, "label", spec.alpha, min_partition_size=0, seed=seed)
    partitioner = IidPartitioner(m) if spec.kind == "iid" else drawn
    partitioner.dataset = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    return [np.asarray(partitioner.load_partition(client)["row"], dtype=np.int64) for client in range(m)]


def _shards(labels: np.ndarray, spec: SplitSpec, seed: int) -> list[np.ndarray]:
    """Return rows sorted by label, cut and dealt; flwr-datasets would leave out what fills no whole shard."""
    each, pieces = spec.shards_per_client, spec.clients * spec.shards_per_client
    if pieces > len(labels):
        raise UserError(
            f"split.shards_per_client={each} for {spec.clients} clients makes {pieces} shards of "
            f"{len(labels)} examples"
        )
    shards = np.array_split(labels.argsort(kind="stable"), pieces)
    dealt = np.random.default_rng([seed, _SIZES]).permutation(pieces).reshape(spec.clients, each)
    return [np.concatenate([shards[piece] for piece in own]) for own in dealt]


def _by_owner(
    owners: np.ndarray | None, clients: int, least: int
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Return each client's rows, and the owners that have fewer than ``least`` and are left out.

    A client has all rows of one owner, or of several, in the order of their names; no owner's rows are parted
    or given to another.
    """
    if owners is None:
        raise UserError("split.kind=natural: the examples have no owners; name their column as data.owner")
    names, numbers = np.unique(owners, return_inverse=True)
    large = np.bincount(numbers, minlength=len(names)) >= least
    left_out = tuple(str(name) for name in names[~large])
    if large.sum() < clients:
        few = f", of {len(names)}," if left_out else ""
        raise UserError(
            f"split.clients={clients}: {large.sum()} owners{few} have at least split.min_size={least} "
            "training examples; others are left out, since no owner's examples are mixed with another's"
        )
    client_of = np.full(len(names), -1)
    client_of[large] = np.arange(large.sum()) * clients // large.sum()
    return [np.flatnonzero(client_of[numbers] == client) for client in range(clients)], left_out


def _with_least(parts: list[np.ndarray], least: int) -> tuple[list[np.ndarray], int]:
    """Return the parts with examples moved from the largest to those below ``least``, and how many were."""
    parts = list(parts)
    sizes = np.array([len(part) for part in parts])
    moved = 0
    for poor in np.flatnonzero(sizes < least):
        while sizes[poor] < least:
            rich = int(sizes.argmax())
            # Half of what it has above the least, so that one client isn't emptied for all.
            count = int(min(least - sizes[poor], max(1, (sizes[rich] - least) // 2)))
            parts[poor] = np.concatenate((parts[poor], parts[rich][-count:]))
            parts[rich] = parts[rich][:-count]
            sizes[poor] += count
            sizes[rich] -= count
            moved += count
    return parts, moved


def _cut(rows: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return rows for training, at least one, and for testing."""
    test = min(len(rows) - 1, round(share * len(rows)))
    return rows[test:], rows[:test]
