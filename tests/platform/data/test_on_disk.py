"""Examples on disk are those that were written, and leave no file behind."""

from pathlib import Path

import numpy as np
import pytest

from lossworks.data import example_sources, on_disk
from lossworks.data.examples import load_examples
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path))
    monkeypatch.setattr(example_sources, "_MANY", 1000)
    monkeypatch.setattr(example_sources, "ROWS_AT_ONCE", 128)
    monkeypatch.setattr(on_disk, "ROWS_AT_ONCE", 100)
    return tmp_path


def test_rows_are_written_and_mapped_without_a_file_that_stays(home: Path) -> None:
    whole = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
    mapped = on_disk.on_disk((whole[start : start + 300] for start in range(0, 1000, 300)), whole.shape)
    rows = np.random.default_rng(1).permutation(1000)[:451]

    assert np.array_equal(mapped, whole)
    found = on_disk.rows_of(mapped, rows, lambda some: 2 * some)
    assert isinstance(found, np.memmap)
    assert np.array_equal(found, 2 * whole[rows])
    assert np.array_equal(on_disk.rows_of(whole, rows, lambda some: 2 * some), found)
    assert list(home.iterdir()) == []


def test_no_room_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    monkeypatch.setattr(on_disk.tempfile, "TemporaryFile", lambda **_: full.open("w+b"))
    with pytest.raises(UserError, match=r"GiB of examples can't be written: No space left"):
        on_disk.on_disk([np.zeros((2**20, 3), dtype=np.float32)], (2**20, 3))


@pytest.mark.parametrize("standardise", [True, False])
def test_many_blobs_are_blobs(standardise: bool) -> None:
    """As many of each class, ten centres, a deviation of 2.5 around them; the seed decides."""
    spec = ExamplesSpec(source="blobs:6000", standardise=standardise, held_out_fraction=0.25)
    data, again, other = (load_examples(spec, seed) for seed in (0, 0, 1))
    inputs, labels = data.train.inputs.double(), data.train.labels

    assert len(data.train) == 4500
    assert len(data.held_out) == 1500
    assert np.bincount(labels).tolist() == [450] * 10
    assert np.array_equal(data.train.inputs, again.train.inputs)
    assert not np.array_equal(data.train.inputs, other.train.inputs)
    within = np.mean([inputs[labels == one].var(0).mean() for one in range(10)])
    if standardise:
        np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-6)
        np.testing.assert_allclose(inputs.std(0, correction=0), 1, atol=1e-6)
        assert 0 < within < 1
    else:
        assert float(within) == pytest.approx(2.5**2, rel=0.05)
    # The held-out ones are of the same centres.
    for one in range(10):
        apart = inputs[labels == one].mean(0) - data.held_out.inputs.double()[
            data.held_out.labels == one
        ].mean(0)
        assert float(apart.abs().max()) < 1.2
