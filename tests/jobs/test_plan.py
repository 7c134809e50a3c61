"""`lossworks train --plan`, and the refusal of what no memory can hold: nothing is started for either."""

import contextlib
import json

import pytest

from lossworks.cli import main
from lossworks.training.planning import plan
from lossworks_jobs.training import train as training
from lossworks_testing.classification import tiny


@pytest.fixture
def file(home, tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("workers were started")

    monkeypatch.setattr(training, "cluster", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(training, "Driver", started)
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps({"kind": "training", **tiny()}))
    return str(path)


def test_a_plan_is_printed_and_written(file, tmp_path, capsys):
    to = tmp_path / "plan.json"
    assert (
        main(["train", file, "--plan", "--memory", "1MiB", "--tokens-per-second", "90", "--json", str(to)])
        == 0
    )
    shown = capsys.readouterr().out

    for text in (
        "all tensors",
        "the process itself",
        "IT DOES NOT FIT",
        "0:00:02 at the given speed",
        "micro_batch_size=1",
    ):
        assert text in shown
    assert json.loads(to.read_text())["fits"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "--memory", "16"], "--memory 16: must be a number above 0 and a unit"),
        (["--plan", "--tokens-per-second", "fast"], "--tokens-per-second fast: must be a number above 0"),
        (
            ["--plan", "--json", "/nowhere/plan.json"],
            "--json /nowhere/plan.json: is no file in an existing folder",
        ),
        (["--memory", "16GiB"], "--memory 16GiB: is for --plan"),
        (["--json", "x"], "--json x: is for --plan"),
    ],
)
def test_wrong_options_are_refused(options, message, file, capsys):
    assert main(["train", file, *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_no_memory_can_hold_is_refused(file, capsys, monkeypatch):
    """In one line before a worker starts, unless somebody knows."""
    monkeypatch.setattr(plan, "_whole_room", lambda _: plan.Room(1000, "this machine", 1))
    assert main(["train", file]) == 2
    error = capsys.readouterr().err

    assert "on each of 1 workers, and this machine has 1,000 B in all" in error
    assert "--over-memory" in error
    assert error.count("\n") == 1
    assert main(["train", file, "--over-memory"]) == 1
    assert "workers were started" in capsys.readouterr().err
