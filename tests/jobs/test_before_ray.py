"""What can be known without Ray is said before Ray starts, in one line, and nothing damaged stops a run."""

import json

import pytest

from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, Trainer
from lossworks.training.outcome import Outcome
from lossworks.training.weights.export import export_run
from lossworks_jobs.training import train as training
from lossworks_testing.classification import tiny
from lossworks_testing.sweeps import tiny_sweep
from lossworks_testing.training import run_in_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))

    def started(*_):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(training, "cluster", started)
    return tmp_path / "home"


def spec_file(folder, **changes):
    file = folder / "spec.yaml"
    file.write_text(json.dumps({"kind": "training", **tiny(**changes)}))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"source": "csv:nowhere.csv"}}, "nowhere.csv: no such file or folder"),
        ({"data": {"source": "imagefolder:nowhere"}}, "nowhere: no such file or folder"),
        ({"data": {"source": "csv:words.csv", "label": "kind"}}, "column 'name' holds 40 different texts"),
        ({"data": {"source": "csv:words.csv"}}, "data.label=label is no column"),
        ({"model": {"kind": "cnn"}}, "model.kind=cnn reads signals and images"),
        ({"resources_per_worker": {"CPU": 4000}}, "but there are"),
        ({"storage": "runs"}, "must be an absolute path"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"optimizer": {"kind": "sgd", "betas": [0.9, 0.9]}}, "kind=sgd does not read it"),
        ({"optimizer": "muon", "model": {"layers": 0}}, "optimizer.kind=muon moves the matrices"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(changes, message, home, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"person {number},{'ab'[number % 2]}\n" for number in range(40))
    (tmp_path / "words.csv").write_text("name,kind\n" + rows)
    assert main(["train", spec_file(tmp_path, **changes)]) == 2
    error = capsys.readouterr().err

    assert message in error
    assert "Traceback" not in error


def test_missing_text_is_named_at_once(home, tmp_path, capsys):
    """Before a tokenizer is trained."""
    file = tmp_path / "lm.yaml"
    file.write_text("kind: training\ndata: {corpus: 'text:/nowhere/at/all'}\n")
    assert main(["train", str(file)]) == 2
    assert "data.corpus=text:/nowhere/at/all: no such file or folder" in capsys.readouterr().err


def test_a_cluster_that_is_gone_is_named_by_its_variable(home, tmp_path, capsys, monkeypatch):
    """As the option is; Ray itself would try for minutes."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert main(["train", spec_file(tmp_path)]) == 2
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [-1]}, "seeds.0=-1"),
        ({"confirm": {"seeds": [-5]}}, "confirm.seeds.0=-5"),
        ({"storage": "runs"}, "must be an absolute path"),
        ({"space": {"model.width": {"uniform": [4, 16]}}}, "model.width=8.58"),
    ],
)
def test_a_sweep_s_mistakes_are_found_when_it_is_read(changes, message):
    with pytest.raises(UserError) as refused:
        tiny_sweep(**changes)
    assert message in str(refused.value)


def damaged(file, how):
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b'{"step": 1}'}[how])


@pytest.mark.parametrize("how", ["empty", "cut", "other"])
def test_a_damaged_manifest_is_passed_over(how, home, tmp_path):
    """An export takes the checkpoint before, and a run that goes on saves as ever."""
    values = tiny(steps=9)
    folder = run_in_folder(values, "run")
    newest = max(folder.checkpoints.glob("step-*"))
    damaged(newest / "manifest.json", how)
    step = export_run(folder, tmp_path / "model", best=False)
    spec = parse_train_spec({**values, "steps": 15})
    outcome = Trainer(Job(spec, None, CheckpointStore(folder.checkpoints, keep=2), lambda *_: None)).run()

    assert step < 9
    assert outcome.status == "finished"
    assert outcome.checkpoint.endswith("15")


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ("adamw", "optimizer=sgd", "optimizer.kind=sgd: the checkpoints of run run were made with adamw"),
        (
            {"kind": "sgd", "momentum": 0.0},
            "optimizer.momentum=0.9",
            "optimizer.momentum=0.9: the checkpoints of run run were made with 0, and keep no sum",
        ),
    ],
)
def test_a_resume_with_another_optimiser_is_refused(stored, asked, message, home, capsys):
    """Its checkpoints don't hold what the other one keeps."""
    run_in_folder(tiny(steps=3, optimizer=stored), "run")
    assert main(["train", "--resume", "run", asked, "steps=6"]) == 2

    assert message in capsys.readouterr().err


@pytest.mark.parametrize("how", ["empty", "cut", "other"])
def test_a_damaged_outcome_is_passed_over(how, home, capsys):
    """The report is drawn without it, and a resume goes on."""
    folder = run_in_folder(tiny(steps=3), "run")
    damaged(folder.outcome_file, how)

    assert Outcome.stored(folder.outcome_file) is None
    assert main(["report", "run"]) == 0
    training._require_resumable(folder.spec(), folder)


def test_a_home_that_can_not_be_made_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "file" / "home"))
    assert main(["export", "run", "--to", str(tmp_path / "to")]) == 2
    assert "set it to a folder that can be written" in capsys.readouterr().err


def test_what_nobody_foresaw_is_one_line_and_a_file(home, tmp_path, monkeypatch, capsys):
    """Which has the traceback; a missing part of the installation says what to install."""

    def broken(*_, **__):
        raise KeyError("inner")

    monkeypatch.setattr(training, "train", broken)
    assert main(["train", spec_file(tmp_path)]) == 1
    error = capsys.readouterr().err
    (file,) = (home / "errors").iterdir()

    assert error.count("\n") == 1
    assert "KeyError: 'inner'" in error
    assert str(file) in error
    assert "in broken" in file.read_text()

    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'ray'", name="ray")

    monkeypatch.setattr(training, "train", missing)
    assert main(["train", spec_file(tmp_path)]) == 2
    assert "this needs ray: pip install 'lossworks[jobs]'" in capsys.readouterr().err
