"""Splits give every example to one client, are repeatable, and are as skewed as they say."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks_federated.reporting.split_picture import draw_split
from lossworks_federated.spec_parts import SplitSpec
from lossworks_federated.splits import _dirichlet, split_examples

KINDS = ("iid", "dirichlet", "shards", "quantity")


def labels_of(n=600, classes=10, seed=0):
    return np.random.default_rng(seed).integers(0, classes, n)


def split(labels=None, seed=0, **changes):
    return split_examples(labels_of() if labels is None else labels, SplitSpec.parse(changes), seed)


def everything(found):
    return np.concatenate([*found.train, *found.test])


@settings(deadline=None)  # the first call imports
@given(
    kind=st.sampled_from(KINDS),
    clients=st.integers(1, 20),
    alpha=st.sampled_from([0.02, 0.1, 1.0, 100.0]),
    min_size=st.integers(2, 12),
    test_fraction=st.floats(0, 0.9),
    seed=st.integers(0, 100),
)
def test_every_example_has_one_client(kind, clients, alpha, min_size, test_fraction, seed):
    """Each has its least and something to train on, whatever is drawn; counts are those of the labels."""
    labels = labels_of(300, 4, seed)
    found = split(
        labels, seed, kind=kind, clients=clients, alpha=alpha, min_size=min_size, test_fraction=test_fraction
    )

    assert sorted(everything(found).tolist()) == list(range(300))
    assert len(found.train) == len(found.test) == clients
    assert all(len(rows) >= 1 for rows in found.train)
    for client, (train, test) in enumerate(zip(found.train, found.test, strict=True)):
        rows = np.concatenate((train, test))
        assert len(rows) >= min_size
        assert np.bincount(labels[rows], minlength=4).tolist() == found.counts[client].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides(kind):
    """The same one gives the same split, another gives another."""
    first, again, other = (split(seed=seed, kind=kind) for seed in (1, 1, 2))

    assert all(np.array_equal(a, b) for a, b in zip(first.train, again.train, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.train, other.train, strict=True))


@pytest.mark.parametrize("alpha", [0.05, 1.0])
def test_dirichlet_shares_are_those_of_flwr_datasets(alpha):
    """Row by row, before any client is given its least."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = labels_of(500, 5)
    partitioner = DirichletPartitioner(12, "label", alpha, min_partition_size=0, seed=3)
    partitioner.dataset = Dataset.from_dict({"label": labels, "row": np.arange(500)})
    ours = _dirichlet(labels, SplitSpec(clients=12, alpha=alpha), 3)

    assert len(ours) == 12
    for client, own in enumerate(ours):
        assert partitioner.load_partition(client)["row"][:] == own.tolist()


def test_many_clients_are_given_their_least_from_the_largest():
    """Of 100,000 clients with 8 examples each in the mean; it takes about a second."""
    labels = labels_of(800_000, 10)
    found = split(labels, kind="dirichlet", clients=100_000, alpha=0.2, min_size=4, test_fraction=0.25)
    drawn = split(labels, kind="dirichlet", clients=100_000, alpha=0.2, min_size=2, test_fraction=0.25)
    sizes = found.counts.sum(1)

    assert np.array_equal(np.sort(np.concatenate((found.train.rows, found.test.rows))), np.arange(800_000))
    assert sizes.min() == 4
    assert np.array_equal(found.train.sizes + found.test.sizes, sizes)
    assert np.array_equal(found.counts.sum(0), np.bincount(labels))
    assert found.moved > drawn.moved > 0
    assert sizes.max() < drawn.counts.sum(1).max()
    # A symmetric Dirichlet's shares have the variance (1/M)(1 − 1/M)/(αM + 1), and ten classes add up.
    whole = _dirichlet(labels, SplitSpec(clients=100_000, alpha=0.2), 0).sizes
    deviation = (10 * (8 / 10) ** 2 / 0.2) ** 0.5
    assert float(whole.std()) == pytest.approx(deviation, rel=0.05)


def test_skew_is_measured():
    """The smaller α the more unlike the clients; two shards hold few classes; iid differs by chance alone."""
    found = {a: split(alpha=a, clients=10).heterogeneity() for a in (0.05, 0.5, 1000.0)}
    distances = [found[a]["label_distance"] for a in (0.05, 0.5, 1000.0)]
    entropies = [found[a]["label_entropy"] for a in (0.05, 0.5, 1000.0)]
    assert distances == sorted(distances, reverse=True)
    assert entropies == sorted(entropies)

    assert split(kind="iid", clients=10).heterogeneity()["label_distance"] < 0.25
    assert split(kind="shards", clients=10).heterogeneity()["classes"] <= 4
    quantity = split(kind="quantity", clients=10, alpha=0.3).heterogeneity()
    assert quantity["effective_clients"] < 7


def test_the_measures_have_their_closed_forms():
    """One class a client: no entropy, a distance of 1 - 1/K, all clients count."""
    labels = np.repeat(np.arange(5), 20)
    found = split(labels, kind="shards", clients=5, shards_per_client=1).heterogeneity()

    assert found == pytest.approx(
        {
            "label_entropy": 0.0,
            "label_distance": 0.8,
            "classes": 1.0,
            "effective_clients": 5.0,
            "largest": 20.0,
            "smallest": 20.0,
        }
    )


def test_moved_examples_are_counted():
    """Hopeless draws end, where drawing anew would not."""
    assert split(clients=100, alpha=0.05, min_size=4).moved > 0
    assert split(kind="iid", clients=10).moved == 0


def test_owners_stay_apart():
    """Whoever has too few examples is left out, and no owner's examples are another client's."""
    owners = np.repeat(["ann", "bob", "cyd", "dan", "eve"], [30, 3, 12, 1, 20])
    labels = labels_of(len(owners), 3)

    def by_owner(clients, min_size=4, seed=0):
        spec = SplitSpec(kind="natural", clients=clients, min_size=min_size)
        return split_examples(labels, spec, seed, owners)

    found = by_owner(3)
    rows = [np.concatenate(parts) for parts in zip(found.train, found.test, strict=True)]
    assert [set(owners[own]) for own in rows] == [{"ann"}, {"cyd"}, {"eve"}]
    assert [len(own) for own in rows] == [30, 12, 20]
    assert found.left_out == ("bob", "dan")
    assert found.moved == 0
    assert by_owner(4, min_size=2).left_out == ("dan",)

    drawn = [by_owner(2, seed=seed) for seed in range(20)]
    taking = {tuple(owners[own[0]] for own in one.train) for one in drawn}
    assert taking == {("ann", "cyd"), ("ann", "eve"), ("cyd", "eve")}
    assert all(len(set(owners[own])) == 1 for one in drawn for own in one.train)
    assert all(len(one.left_out) == 3 for one in drawn)
    with pytest.raises(UserError, match=r"clients=4: 3 owners, of 5, have at least split.min_size=4"):
        by_owner(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clients": 200}, "split.clients=200 with split.min_size=4 need 800 examples; there are 600"),
        ({"kind": "shards", "clients": 100, "shards_per_client": 9}, "makes 900 shards of 600 examples"),
        ({"alpha": 0}, "alpha=0: input should be greater than 0"),
        ({"kind": "dirichlett"}, "kind='dirichlett'"),
        ({"test_fraction": 1}, "test_fraction=1"),
    ],
)
def test_wrong_splits_are_refused(changes, message):
    """With the numbers that don't fit."""
    with pytest.raises(UserError) as error:
        split(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize("clients", [8, 90])
def test_a_split_is_drawn(tmp_path, clients):
    """As bars or as an image."""
    path = draw_split(split(clients=clients, min_size=2), tmp_path / "split.png", title="digits")

    assert struct.unpack(">II", path.read_bytes()[16:24]) == (1600, 800)
