"""Pictures that only some runs have: telemetry and neural collapse."""

import struct

import pytest

from lossworks.reporting.finish import draw_analyses, draw_telemetry
from lossworks.runs import RunFolder
from lossworks.tasks.classification import ClassifierSpec
from lossworks.tracking import Journal
from lossworks.training.outcome import Outcome
from lossworks_testing.classification import tiny


@pytest.fixture
def folder(tmp_path):
    """Return the folder of a run that has recorded nothing out of the ordinary."""
    made = RunFolder(tmp_path)
    made.spec_file.write_text(ClassifierSpec.parse(tiny()).to_yaml())
    record(made, {"train/loss": 1.0})
    return made


def record(folder, metrics, steps=5):
    with Journal.open(folder.journal) as journal:
        for step in range(1, steps + 1):
            journal.write(step, {name: value / step for name, value in metrics.items()})


def size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_runs_without_them_have_no_such_pictures(folder):
    """Nor has a run that has not ended."""
    assert draw_telemetry(folder) is None
    assert draw_analyses(folder) == []
    Outcome("finished", "", 5, {}, None, None).write(folder.outcome_file)
    assert draw_analyses(folder) == []


def test_telemetry_is_drawn_with_what_there_is(folder):
    """Losses of whole batches have no losses of single examples."""
    quantiles = {f"telemetry/gradient_norm_{which}": 1.0 for which in ("p05", "p50", "p95", "max")}
    record(folder, {**quantiles, "telemetry/zero_gradient": 0.5, "telemetry/spike": 7.0})
    path = draw_telemetry(folder)

    assert path == folder.telemetry
    assert size(path) == (1600, 1000)


def test_collapse_is_drawn_with_its_curves(folder):
    """From the journal and the outcome alone."""
    matrix = [[1.0, -0.5], [-0.5, 1.0]]
    names = [f"{w} {n}" for w in ("found", "predicted") for n in ("classifier", "features", "aligned")]
    folder.spec_file.write_text(ClassifierSpec.parse(tiny(analyses=["neural-collapse"])).to_yaml())
    pictured = {"neural-collapse": dict.fromkeys(names, matrix)}
    Outcome("finished", "", 5, {}, None, None, pictured=pictured).write(folder.outcome_file)
    record(folder, {"eval/nc1": 0.4, "eval/nc4": 0.0})

    assert draw_analyses(folder) == [folder.picture("neural-collapse")]
    assert size(folder.picture("neural-collapse"))[0] == 1100
