"""Splits of labelled examples over clients, and how unlike each other the clients are.

N examples, M clients, K classes. Everything is a function of labels, spec and seed.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from lossworks.errors import UserError
from lossworks_federated.spec_parts import SplitSpec

_ORDER, _SIZES, _TESTS, _OWNERS = 0, 1, 2, 4  # what a random stream is for; 3 and 5 are of feature shifts


class OwnRows(Sequence[np.ndarray]):
    """Which rows each client has, cut from one array: a million small ones would take more than they hold.

    Args:
        rows: Of all clients, one after the other, int64 (N,).
        ends: Where each client's end, int64 (M,), rising.
    """

    def __init__(self, rows: np.ndarray, ends: np.ndarray) -> None:
        self.rows, self.ends = rows, ends

    @property
    def sizes(self) -> np.ndarray:
        """How many rows each client has, int64 (M,)."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, client: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, client: slice) -> "OwnRows": ...
    def __getitem__(self, client: int | slice) -> "np.ndarray | OwnRows":
        if isinstance(client, slice):
            return _of_parts([self[place] for place in range(*client.indices(len(self)))])
        if not 0 <= client < len(self):
            raise IndexError(client)
        return self.rows[self.ends[client - 1] if client else 0 : self.ends[client]]


@dataclass(frozen=True, eq=False)
class Split:
    """Which examples each client has; clients are named by their partition, from 0.

    Attributes:
        train: Rows that each client trains on.
        test: Rows that each keeps for its own tests; none where there are none.
        counts: Examples of each class that each client has, train and test, int64 (M, K).
        moved: Examples that went to other clients than drawn, to give each its least.
        left_out: Names of owners that are no clients: too small, or not drawn.
    """

    train: OwnRows
    test: OwnRows
    counts: np.ndarray
    moved: int
    left_out: tuple[str, ...] = ()

    def pooled(self) -> "Split":
        """Return the split in which the first client trains on what all of them have; tests stay."""
        everything = len(self.train.rows)
        return replace(self, train=OwnRows(self.train.rows, np.full(len(self.train), everything)))

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
        parts, left_out = _by_owner(owners, spec, seed)
    else:
        drawn = _partition(labels[shuffled], spec, seed)
        parts, moved = _with_least(OwnRows(shuffled[drawn.rows], drawn.ends), spec.min_size)
    classes, sizes = int(labels.max()) + 1, parts.sizes
    places = np.repeat(np.arange(spec.clients), sizes) * classes + labels[parts.rows]
    counts = np.bincount(places, minlength=spec.clients * classes).reshape(spec.clients, classes)
    stream = np.random.default_rng([seed, _TESTS])
    for own in parts:
        stream.shuffle(own)
    tests = np.minimum(sizes - 1, np.round(spec.test_fraction * sizes).astype(np.int64))
    for_test = np.arange(len(parts.rows)) - np.repeat(parts.ends - sizes, sizes) < np.repeat(tests, sizes)
    return Split(
        OwnRows(parts.rows[~for_test], np.cumsum(sizes - tests)),
        OwnRows(parts.rows[for_test], np.cumsum(tests)),
        counts,
        moved,
        left_out,
    )


def own_split(labels: np.ndarray, spec: SplitSpec, seed: int, client: int, classes: int) -> Split:
    """Return the split of a client that has its own examples, in which others have none.

    Args:
        labels: The client's, shape (N,), int64 in [0, K).
        spec: Says how many it has at least, and which share of them is for its own test.
        seed: Of the draw of its test examples.
        client: Its partition.
        classes: K.

    Raises:
        UserError: It has too few.
    """
    if len(labels) < spec.min_size:
        raise UserError(f"split.min_size={spec.min_size}: client {client} has {len(labels)} examples")
    rows = np.random.default_rng([seed, _TESTS, client]).permutation(len(labels))
    tests = min(len(rows) - 1, round(spec.test_fraction * len(rows)))
    counts = np.zeros((client + 1, classes), dtype=np.int64)
    counts[client] = np.bincount(labels, minlength=classes)
    train, test = (OwnRows(own, np.array([*[0] * client, len(own)])) for own in (rows[tests:], rows[:tests]))
    return Split(train, test, counts, 0)


def _partition(labels: np.ndarray, spec: SplitSpec, seed: int) -> OwnRows:
    """Return all rows by client; some may have none."""
    if spec.kind == "quantity":
        shares = np.random.default_rng([seed, _SIZES]).dirichlet(np.full(spec.clients, spec.alpha))
        return OwnRows(np.arange(len(labels)), _cuts(shares, len(labels), np.round))
    if spec.kind == "shards":
        return _shards(labels, spec, seed)
    if spec.kind == "dirichlet":
        return _dirichlet(labels, spec, seed)
    sizes = np.full(spec.clients, len(labels) // spec.clients)
    sizes[: len(labels) % spec.clients] += 1
    return OwnRows(np.arange(len(labels)), np.cumsum(sizes))


def _dirichlet(labels: np.ndarray, spec: SplitSpec, seed: int) -> OwnRows:
    """Return what flwr-datasets' DirichletPartitioner gives, row by row; its lists take minutes for many.

    Its own rule for a least size draws everything anew, in vain for many clients; ours is ``_with_least``.
    """
    stream = np.random.default_rng(seed)
    rows, owners = [], []
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        ends = _cuts(stream.dirichlet(np.full(spec.clients, spec.alpha)), len(mine), np.trunc)
        rows.append(mine)
        owners.append(np.repeat(np.arange(spec.clients), np.diff(ends, prepend=0)))
    owner = np.concatenate(owners)
    dealt = OwnRows(
        np.concatenate(rows)[np.argsort(owner, kind="stable")],
        np.cumsum(np.bincount(owner, minlength=spec.clients)),
    )
    for own in dealt:
        stream.shuffle(own)
    return dealt


def _cuts(shares: np.ndarray, count: int, whole: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return where ``count`` rows are cut by shares that add up to 1, made whole numbers."""
    ends = whole(np.cumsum(shares) * count).astype(np.int64)
    ends[-1] = count
    return ends


def _shards(labels: np.ndarray, spec: SplitSpec, seed: int) -> OwnRows:
    """Return rows sorted by label, cut and dealt; flwr-datasets would leave out what fills no whole shard."""
    each, pieces = spec.shards_per_client, spec.clients * spec.shards_per_client
    if pieces > len(labels):
        raise UserError(
            f"split.shards_per_client={each} for {spec.clients} clients makes {pieces} shards of "
            f"{len(labels)} examples"
        )
    shards = np.array_split(labels.argsort(kind="stable"), pieces)
    dealt = np.random.default_rng([seed, _SIZES]).permutation(pieces).reshape(spec.clients, each)
    return _of_parts([np.concatenate([shards[piece] for piece in own]) for own in dealt])


def _by_owner(owners: np.ndarray | None, spec: SplitSpec, seed: int) -> tuple[OwnRows, tuple[str, ...]]:
    """Return each client's rows, all of one owner, and the owners that are no clients.

    Those have fewer rows than the least, or were not drawn where there are more of them than clients. The
    clients are in the order of their owners' names.
    """
    if owners is None:
        raise UserError("split.kind=natural: the examples have no owners; name their column as data.owner")
    names, numbers = np.unique(owners, return_inverse=True)
    large = np.flatnonzero(np.bincount(numbers, minlength=len(names)) >= spec.min_size)
    if len(large) < spec.clients:
        few = f", of {len(names)}," if len(large) < len(names) else ""
        raise UserError(
            f"split.clients={spec.clients}: {len(large)} owners{few} have at least split.min_size="
            f"{spec.min_size} training examples; others are left out, since no owner's examples are mixed "
            "with another's"
        )
    stream = np.random.default_rng([seed, _OWNERS])
    drawn = np.sort(stream.choice(large, spec.clients, replace=False)) if len(large) > spec.clients else large
    left_out = tuple(str(name) for name in np.delete(names, drawn))
    return _of_parts([np.flatnonzero(numbers == owner) for owner in drawn]), left_out


def _of_parts(parts: Sequence[np.ndarray]) -> OwnRows:
    return OwnRows(np.concatenate(parts), np.cumsum([len(part) for part in parts]))


def _with_least(parts: OwnRows, least: int) -> tuple[OwnRows, int]:
    """Return the parts with examples moved from the largest to those below ``least``, and how many were."""
    sizes, moved = parts.sizes, 0
    poor = np.flatnonzero(sizes < least)
    if not len(poor):
        return parts, 0
    # The largest first, and of those the first; what a client gives and takes is in ``changed``.
    heap = [(-int(size), client) for client, size in enumerate(sizes) if size > least]
    heapq.heapify(heap)
    changed: dict[int, np.ndarray] = {}
    for client in poor.tolist():
        taken = [parts[client]]
        while (missing := least - sum(map(len, taken))) > 0:
            size, rich = -heap[0][0], heap[0][1]
            # Half of what it has above the least, so that one client isn't emptied for all.
            count = min(missing, max(1, (size - least) // 2))
            whole = changed.get(rich, parts[rich])
            taken.append(whole[-count:])
            changed[rich] = whole[:-count]
            if size - count > least:
                heapq.heapreplace(heap, (count - size, rich))
            else:
                heapq.heappop(heap)
            moved += count
        changed[client] = np.concatenate(taken)
    ends = sizes.copy()
    for client, rows in changed.items():
        ends[client] = len(rows)
    ends = np.cumsum(ends)
    found = OwnRows(np.empty_like(parts.rows), ends)
    stays = np.ones(len(sizes), dtype=bool)
    stays[list(changed)] = False
    found.rows[np.repeat(stays, np.diff(ends, prepend=0))] = parts.rows[np.repeat(stays, sizes)]
    for client, rows in changed.items():
        found[client][:] = rows
    return found, moved
