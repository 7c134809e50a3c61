import math
import struct

import numpy as np
import pytest

from lossworks.reporting import train_report
from lossworks.reporting.phase_colours import PHASE_COLOURS
from lossworks.reporting.phase_strip import time_shares, utilisation
from lossworks.reporting.series import series, smooth
from lossworks.tasks import task_class
from lossworks.training.measure.phases import PHASES


def rows(steps=60):
    for step in range(1, steps + 1):
        metrics = {"train/loss": 9 / step, "train/lr": 1e-3 / step, "train/tokens_per_second": 2e4 + step}
        if step % 10 == 0:
            metrics["eval/loss"] = 10 / step
        yield {"step": step, "time_ms": step, "metrics": metrics}


def size(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


LM = task_class("language-model")
MEMORY = {"linear cross-entropy": 21.4 * 2**20, "with logits": 1538 * 2**20}


@pytest.mark.parametrize("steps", [1, 12, 60, 3000])
def test_a_report_is_a_picture_of_1600_by_1000(tmp_path, steps):
    path = tmp_path / "new" / "report.png"

    assert (
        train_report(
            list(rows(steps)), task=LM, head_memory=MEMORY, title="a [b] $c", path=path, guess=math.log(512)
        )
        == path
    )

    assert size(path) == (1600, 1000)


@pytest.mark.parametrize("missing", ["train/loss", "eval/loss", "train/lr", "train/tokens_per_second", "all"])
def test_missing_series_are_left_out(tmp_path, missing):
    kept = [] if missing == "all" else list(rows())
    for row in kept:
        row["metrics"].pop(missing, None)

    path = train_report(kept, task=LM, head_memory=None, title="missing", path=tmp_path / "report.png")

    assert size(path) == (1600, 1000)


def test_values_that_are_not_finite_do_not_break_it(tmp_path):
    diverged = list(rows())
    for row in diverged[30:]:
        row["metrics"] = dict.fromkeys(row["metrics"], math.nan) | {"train/loss": math.inf}

    path = train_report(
        diverged, task=LM, head_memory={"x": math.nan}, title="diverged", path=tmp_path / "report.png"
    )

    assert size(path) == (1600, 1000)


def test_drawing_leaves_matplotlib_settings_and_backend_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    train_report(list(rows()), task=LM, head_memory=MEMORY, title="t", path=tmp_path / "report.png")

    assert dict(mpl.rcParams) == before


def test_series_leaves_out_what_is_not_finite():
    found = [{"step": 2, "metrics": {"a": 5.0}}, {"step": 1, "metrics": {"a": math.nan, "b": 1.0}}]

    steps, values = series(found, "a")

    assert (steps.tolist(), values.tolist()) == ([2.0], [5.0])
    assert series(found, "c") is None
    assert series(found[1:], "a") is None


@pytest.mark.parametrize(("count", "window"), [(1, 5), (4, 9), (50, 1), (50, 7)])
def test_smoothing_is_the_weighted_mean_of_the_neighbours(count, window):
    values = np.random.default_rng(0).normal(size=count)

    for index, value in enumerate(smooth(values, window)):
        weights = [max(0, 1 - abs(index - other) / window) for other in range(count)]
        assert value == pytest.approx(np.average(values, weights=weights))
    assert smooth(np.ones(count), window) == pytest.approx(np.ones(count))


@pytest.mark.parametrize(
    "curve",
    [
        None,
        {"examples": [], "confidence": [], "accuracy": []},
        {"examples": [3.0, 97.0], "confidence": [0.4, 0.99], "accuracy": [0.0, 1.0]},
    ],
)
def test_a_classifiers_report_has_a_reliability_diagram(tmp_path, curve):
    """Also where nothing was measured."""
    found = list(rows())
    for row in found:
        row["metrics"] |= {"eval/accuracy": 0.5, "eval/ece": 0.1, "train/examples_per_second": 1e4}

    path = train_report(
        found,
        task=task_class("classification"),
        head_memory=None,
        title="digits",
        path=tmp_path / "report.png",
        pictured={"reliability": curve},
    )

    assert size(path) == (1600, 1000)


def test_time_is_that_of_the_whole_run_or_the_mean_of_its_records():
    """The outcome's seconds where there are any; else the recorded shares; else nothing."""
    recorded = [
        {"step": 1, "metrics": {"time/data": 0.2, "time/other": 0.8}},
        {"step": 2, "metrics": {"time/data": 0.4, "time/other": 0.6}},
    ]

    assert time_shares(recorded, {"data": 1.0, "other": 3.0}) == ({"data": 0.25, "other": 0.75}, 4.0)
    assert time_shares(recorded, {}) == ({"data": pytest.approx(0.3), "other": pytest.approx(0.7)}, None)
    assert time_shares(list(rows()), None) == ({}, None)


def test_utilisation_names_its_peak():
    """The median of the steps, in words."""
    for name, peak in (("mfu", "the maker's peak"), ("mfu_of_measured_peak", "the measured peak")):
        found = [{"step": n, "metrics": {f"train/{name}": n / 10}} for n in (1, 2, 4)]
        assert utilisation(found) == f"20 % of {peak}"
    assert utilisation(list(rows())) is None


def test_every_phase_has_a_colour_of_its_own():
    assert tuple(PHASE_COLOURS) == PHASES
    assert len(set(PHASE_COLOURS.values())) == len(PHASES)


@pytest.mark.parametrize("seconds", [None, {"data": 0.0}, dict.fromkeys(PHASES, 100.0) | {"head": 1e-6}])
def test_a_report_says_where_the_time_went(tmp_path, seconds):
    """Also where next to nothing, or nothing at all, was measured."""
    path = train_report(
        list(rows()), task=LM, head_memory=MEMORY, title="time", path=tmp_path / "report.png", seconds=seconds
    )

    assert size(path) == (1600, 1000)
