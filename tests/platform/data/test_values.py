"""Examples with real targets, and with sets of labels: sources, scales, and errors that say where."""

import numpy as np
import pytest
import torch

from lossworks.data.label_sets import load_label_sets
from lossworks.data.values import load_values
from lossworks.errors import UserError
from lossworks.specs.tasks.values import LabelSetsSpec, ValuesSpec


def values(seed=0, **fields):
    return load_values(ValuesSpec.parse(fields), seed)


def label_sets(seed=0, **fields):
    return load_label_sets(LabelSetsSpec.parse(fields), seed)


def test_targets_are_on_the_scale_that_is_trained_on():
    """Mean 0 and deviation 1 over training targets, held-out ones on the same scale; or as they came."""
    scaled = values(source="friedman:80")
    plain = values(source="friedman:80", standardise_targets=False)

    assert scaled.train.labels.mean() == pytest.approx(0, abs=1e-6)
    assert scaled.train.labels.std(correction=0) == pytest.approx(1, abs=1e-6)
    assert (plain.mean, plain.deviation) == (0, 1)
    for ours, theirs in ((scaled.train, plain.train), (scaled.held_out, plain.held_out)):
        torch.testing.assert_close(ours.labels * scaled.deviation + scaled.mean, theirs.labels)
    assert (len(scaled.train), len(scaled.held_out)) == (60, 20)
    assert scaled.train.inputs.mean(0).abs().max() < 1e-5


def test_outliers_are_a_share_of_training_targets():
    """Ten deviations away, on either side; held-out targets are as they came, and so is the scale."""
    clean, spoilt = (values(source="friedman:2000", outliers=share) for share in (0.0, 0.2))
    moved = (spoilt.train.labels - clean.train.labels)[spoilt.train.labels != clean.train.labels]

    assert len(moved) / len(clean.train) == pytest.approx(0.2, abs=0.03)
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 10.0), rtol=1e-5, atol=0)
    assert (moved > 0).double().mean() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(clean.held_out.labels, spoilt.held_out.labels)
    assert (clean.mean, clean.deviation) == (spoilt.mean, spoilt.deviation)


def test_bags_are_whole_and_held_out_examples_are_alone():
    """Each bag's rows follow one another; what fills no bag is left out."""
    data = values(source="friedman:87", bag_size=8)
    batch = data.train.batch(np.arange(16))

    assert len(data.train) == 64
    assert batch["segments"].tolist() == [0] * 8 + [1] * 8
    assert data.held_out.batch(np.arange(3))["segments"].tolist() == [0, 1, 2]


def test_a_chains_held_out_values_solve_the_bellman_equation():
    """v = r + γ·P·v, with rewards and chances as the transitions have them on average."""
    data = values(source="chain:200000", discount=0.5, standardise=False)
    states = {tuple(row): number for number, row in enumerate(data.held_out.inputs.tolist())}
    at = torch.tensor([states[tuple(row)] for row in data.train.inputs.tolist()])
    then = torch.tensor([states[tuple(row)] for row in data.train.further["next_inputs"].tolist()])
    v = data.held_out.labels.double()
    seen = data.train.labels.double() + 0.5 * v[then]
    means = torch.zeros(100, dtype=torch.float64).index_add(0, at, seen) / torch.bincount(at)

    # Of 2,000 draws a state, of deviation about 1.1.
    assert (means - v).abs().max() < 0.12
    assert set(data.train.further["discounts"].tolist()) == {0.5}
    assert set(data.held_out.further["discounts"].tolist()) == {0.0}


def test_files_are_read(tmp_path):
    """A table and arrays hold the same numbers, with the target's column wherever it is."""
    g = np.random.default_rng(0)
    x, y = g.normal(size=(12, 2)), g.normal(size=12)
    rows = "\n".join(f"{a!r},{t!r},{b!r}" for (a, b), t in zip(x.tolist(), y.tolist(), strict=True))
    (tmp_path / "a.csv").write_text(f"a,price,b\n{rows}\n")
    np.savez(tmp_path / "a.npz", x=x, y=y)
    table = values(source=f"csv:{tmp_path}/a.csv", label="price")
    arrays = values(source=f"npz:{tmp_path}/a.npz")

    assert torch.equal(table.train.inputs, arrays.train.inputs)
    assert torch.equal(table.held_out.labels, arrays.held_out.labels)
    assert table.shape == (2,)


def test_tables_with_errors_say_where(tmp_path):
    """Line, column and value; lines are counted as an editor does."""
    file = tmp_path / "a.csv"

    def refusal(text, **fields):
        file.write_text(text)
        with pytest.raises(UserError) as refused:
            values(source=f"csv:{file}", **fields)
        return str(refused.value).removeprefix(f"{file}")

    assert refusal("x,target\n1,2\n\n3,four\n") == ", line 4, column target: 'four' is no finite number"
    assert refusal("x,target\n1,2\n3,inf\n") == ", line 3, column target: 'inf' is no finite number"
    assert refusal("x,target\n1,2\ninf,4\n").startswith(", line 3, column x: 'inf' is no finite number")
    assert refusal("x,target\n1,2\n3,\n") == ", line 3, column target: is empty"
    assert refusal("x,target\n1,2\n3\n") == ", line 3: holds 1 cells for 2 columns"
    assert refusal("x,y\n1,2\n") == ": data.label=target is no column; there are x, y"
    assert "holds 1 example; two are the least" in refusal("x,target\n1,2\n")
    assert "all 2 targets are 5; there is nothing to learn" in refusal("x,target\n1,5\n2,5\n")


def test_arrays_with_errors_say_which(tmp_path):
    """Shapes, kinds and numbers that are not finite, of values and of sets of labels."""
    file = tmp_path / "a.npz"

    def refusal(read, **arrays):
        np.savez(file, **arrays)
        with pytest.raises(UserError) as refused:
            read(source=f"npz:{file}")
        return str(refused.value).removeprefix(f"{file}: ")

    x, y = np.ones((3, 2)), np.arange(3.0)
    assert refusal(values, x=x) == "holds x; the arrays x and y are needed"
    assert "x (3, 2) and y (2,) must be numbers" in refusal(values, x=x, y=y[:2])
    assert "must be numbers" in refusal(values, x=x, y=np.array(["a", "b", "c"]))
    assert refusal(values, x=x, y=np.array([1, np.nan, 2])) == "y holds NaN or infinity"
    assert refusal(values, x=np.full((3, 2), np.inf), y=y) == "x holds NaN or infinity"
    assert "y (3, 1) must be numbers (N, …) and integers (N, P)" in refusal(label_sets, x=x, y=y[:, None])
    assert refusal(label_sets, x=x, y=np.zeros((3, 3), dtype=int)) == (
        "y must hold at least two labels, not 0"
    )
    assert refusal(label_sets, x=np.full((3, 2), np.nan), y=np.ones((3, 3), dtype=bool)).startswith("x holds")


@pytest.mark.parametrize("source", ["friedman:19", "friedman", "chain:x", "csv:", "diabetes:3", "digits"])
def test_sources_are_of_known_forms(source):
    with pytest.raises(
        UserError,
        match=r"must be one of diabetes, friedman:N, .*, npz:PATH, with N",
    ):
        values(source=source)


def test_sets_of_labels_are_read_from_tables_and_arrays(tmp_path):
    """Joined by a separator, as padded lists, as zeros and ones: the same sets; an empty one is none."""
    sets = [{0, 2}, {1}, {2}, {0, 1, 2}, set(), {1, 2}, {0}, {2}]
    x = np.arange(16.0).reshape(8, 2)
    names = ["cat", "dog", "emu"]
    rows = [f"{a:g},{'; '.join(names[n] for n in s)};,{b:g}" for (a, b), s in zip(x, sets, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(["a,labels,b", *rows]))
    padded = np.full((8, 3), -1)
    ones = np.zeros((8, 3), dtype=np.uint8)
    for row, own in enumerate(sets):
        padded[row, : len(own)] = sorted(own)
        ones[row, sorted(own)] = 1
    np.savez(tmp_path / "lists.npz", x=x, y=padded)
    np.savez(tmp_path / "ones.npz", x=x, y=ones)
    np.savez(tmp_path / "flags.npz", x=x, y=ones.astype(bool))
    np.savez(tmp_path / "two.npz", x=x, y=np.array([[0, 1], [1, 0]] * 4))

    found = [label_sets(source=f"csv:{tmp_path}/a.csv", separator=";")]
    found += [label_sets(source=f"npz:{tmp_path}/{kind}.npz") for kind in ("lists", "ones", "flags")]
    assert found[0].names == ("cat", "dog", "emu")
    assert found[1].names == ("0", "1", "2")
    assert label_sets(source=f"npz:{tmp_path}/two.npz").train.labels.shape == (6, 1)
    for data in found:
        assert torch.equal(data.train.inputs, found[0].train.inputs)
        own = [
            {n for n in row if n >= 0} for part in (data.train, data.held_out) for row in part.labels.tolist()
        ]
        expected = [
            sets[int(row[0] // 2)]
            for part in (data.train, data.held_out)
            for row in (
                part.inputs.numpy() * data.standardisation.deviation + data.standardisation.mean
            ).round()
        ]
        assert own == expected


def test_tables_with_too_few_labels_are_refused(tmp_path):
    """One label for all is nothing to learn."""
    (tmp_path / "a.csv").write_text("x,labels\n1,a\n2,a|\n")
    with pytest.raises(UserError, match="column labels must hold at least two labels, not 1"):
        label_sets(source=f"csv:{tmp_path}/a.csv")


def test_topics_are_the_best_of_a_map_that_all_seeds_share():
    """So that a larger set, or another seed, is more of the same; each point has five labels of L."""
    first, again, other = label_sets(labels=50), label_sets(labels=50), label_sets(1, labels=50)

    assert torch.equal(first.train.labels, again.train.labels)
    assert not torch.equal(first.train.labels, other.train.labels)
    assert first.train.labels.shape == (1500, 5)
    assert all(len(set(row)) == 5 for row in first.train.labels.tolist())
    assert len(first.names) == 50
    assert 0 <= first.train.labels.min() <= first.train.labels.max() < 50
