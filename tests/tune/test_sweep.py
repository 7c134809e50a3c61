"""Whole sweeps: in MLflow, killed and gone on with, from the command line, and by Ray Tune."""

import copy
import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.tasks import read_train_spec
from lossworks.tracking import read_all
from lossworks_testing.sweeps import packed, results, seen, sweep_at, tiny_sweep
from lossworks_tune.sweeps.engines.ray_source import Source
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.run import engine_of, sweep
from lossworks_tune.sweeps.spec import SweepSpec

COMMAND = [sys.executable, "-c", "import sys; from lossworks.cli import main; sys.exit(main())"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("my home #1-")


@pytest.fixture
def at_home(home, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(home))
    (home / "runs").mkdir(exist_ok=True)
    return home


def write_spec(path, spec):
    file = path / "sweep.yaml"
    file.write_text(json.dumps(spec.model_dump(mode="json")))  # JSON is YAML
    return file


def killed(home, file, *, ended):
    """Start a sweep, kill it with SIGKILL once so many trials have ended, and return its folder."""
    before = set((home / "runs").iterdir())
    process = subprocess.Popen(
        [*COMMAND, "tune", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )
    deadline, new = time.monotonic() + 200, set()
    while time.monotonic() < deadline:
        new = set((home / "runs").iterdir()) - before
        if sum(1 for folder in new for _ in folder.glob("trials/*/end.json")) >= ended:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = new
    return folder


def test_a_sweep_is_tracked_as_parent_and_children(at_home):
    """Every trial once with every row once; the parent has the table, the pictures and the best spec."""
    from mlflow import MlflowClient

    spec = tiny_sweep(trials=12, seeds=[0, 1], scheduler="asha", confirm={"top": 2, "seeds": [50, 51]})
    result = sweep(spec)
    client = MlflowClient(tracking_uri=f"sqlite:///{at_home / 'mlflow.db'}")
    parent = client.get_run(result.folder.run_id)
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=1000
    )
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    by_kind = {"trials": result.results.trials, "confirm": result.results.confirmed}

    assert parent.info.status == "FINISHED"
    assert {"spec.yaml", "trials.csv", "best.yaml", "hyperparameters.png", "curves.png"} <= files
    assert (
        len(found)
        == sum(map(len, by_kind.values()))
        == len({run.info.run_name for run in found}) + len(result.results.confirmed)
    )
    for kind, trials in by_kind.items():
        for trial in trials:
            folder = result.folder.path / kind / f"{trial.configuration.number:05d}"
            run = client.get_run((folder / "run-id").read_text())
            points = client.get_metric_history(run.info.run_id, "eval/accuracy")
            assert [(p.step, p.value) for p in points] == [
                (row["step"], row["metrics"]["eval/accuracy"]) for row in trial.rows
            ]
            expected = {"finished": "FINISHED", "stopped": "KILLED"}[trial.status]
            assert run.info.status == expected
            assert run.data.params["loss.name"] == trial.configuration.loss
    best = read_train_spec(result.best)
    assert best.loss.name == result.results.winner.configuration.loss
    with (result.folder.path / "trials.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(result.results.trials) == 15


def test_a_killed_sweep_goes_on_to_the_same_result(at_home, tmp_path, capsys):
    """SIGKILL between any two instructions; no trial is there twice, none is lost, none is trained again."""
    changes = {"trials": 60, "at_once": 4, "scheduler": "asha", "name": "killed"}
    spec = tiny_sweep(**changes)
    expected = packed(spec, tmp_path / "whole")
    folder = killed(at_home, write_spec(tmp_path, spec), ended=8)
    kept = {file.parent.name: file.read_text() for file in folder.glob("trials/*/end.json")}
    assert 0 < len(kept) < 63
    # A power cut besides: what was not on the disk yet is empty.
    ends = sorted(folder.glob("trials/*/end.json"))
    ends[0].write_text("")
    (ends[1].parent / "configuration.json").write_text("")

    assert main(["tune", "--resume", str(folder)]) == 0

    assert seen(results(spec, folder)) == seen(expected)
    assert "over the baseline" in capsys.readouterr().out
    assert all((folder / "trials" / name / "end.json").read_text() == end for name, end in kept.items())
    assert len(list(folder.glob("trials/*/tracked"))) == 63


def test_the_command_refuses_in_one_line(at_home, tmp_path, capsys):
    """A wrong field, nothing to search, another spec on resuming, a run of another room."""
    file = write_spec(tmp_path, tiny_sweep(trials=1, confirm={"top": 0}, name="small"))
    assert main(["tune", str(file), "losses=[ldr,cmp-sum]"]) == 2
    assert "did you mean comp-sum" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "SPEC is missing" in capsys.readouterr().err
    assert main(["tune", str(file)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("train the best: "))
    assert Path(shlex.split(line)[-1]).is_file()
    assert main(["tune", "--resume", "small", "trials=5", "wilcoxon=0"]) == 2
    error = capsys.readouterr().err
    assert "trials (was 1, now 5)" in error
    assert "wilcoxon (was 0.1, now 0.0)" in error
    other = tmp_path / "other"
    other.mkdir()
    (other / "spec.yaml").write_text("kind: training\ntask: classification\n")
    assert main(["tune", "--resume", str(other)]) == 2
    assert "describes a training, which `lossworks train` runs and resumes" in capsys.readouterr().err


def test_more_trials_at_once_than_have_room_are_refused_before_anything_starts(at_home, tmp_path, capsys):
    """With what is needed and what is there; no run is entered."""
    before = set((at_home / "runs").iterdir())
    file = write_spec(tmp_path, tiny_sweep(engine="ray", at_once=10_000))

    assert main(["tune", str(file)]) == 2
    assert "at_once=10000: trials of 1 CPUs each need 10000, but" in capsys.readouterr().err
    assert set((at_home / "runs").iterdir()) == before


def test_all_that_fails_fails_the_run_with_the_reason(at_home, monkeypatch):
    """And it is so in MLflow."""
    from mlflow import MlflowClient

    from lossworks.errors import RunError
    from lossworks.training.packed import PackedReport

    del at_home
    monkeypatch.setattr(
        "lossworks_tune.packs.advance",
        lambda runs, steps, *_: [
            PackedReport(1, {}, "the loss became NaN or infinite at step 1") for _ in runs
        ],
    )
    with pytest.raises(
        RunError, match=r"4 of 4 failed, the first because seed 0: the loss became NaN"
    ) as error:
        sweep(tiny_sweep(losses=["comp-sum"], trials=3))
    run_id = str(error.value).split()[1].rstrip(":")
    uri = f"sqlite:///{Path(os.environ['LOSSWORKS_HOME']) / 'mlflow.db'}"
    run = MlflowClient(tracking_uri=uri).get_run(run_id)
    assert run.info.status == "FAILED"
    assert "NaN" in run.data.tags["lossworks.reason"]


@pytest.mark.parametrize(
    ("changes", "engine", "why"),
    [
        ({}, "packed", None),
        ({"engine": "ray"}, "ray", None),
        ({"base": {"task": "classification", "model": {"dropout": 0.5}}}, "ray", None),
        ({"base": {"task": "classification", "model": {"dropout": 0.5}}, "engine": "packed"}, "", "dropout"),
        ({"base": {}, "losses": ["ldr"], "engine": "packed"}, "", "language models fill a worker each"),
        ({"engine": "ray", "scheduler": "pbt"}, "", "copies parameters"),
        ({"space": {"model.dropout": [0.0, 0.5]}}, "ray", None),
        (
            {"space": {"model.dropout": [0.0, 0.5]}, "engine": "packed"},
            "",
            "engine=packed: space.model.dropout: model.dropout=0.5 draws random numbers",
        ),
        ({"space": {"optimizer.kind": ["adamw", "sgd"]}}, "ray", None),
        (
            {"space": {"optimizer.kind": ["adamw", "sgd"]}, "engine": "packed"},
            "",
            "engine=packed: space.optimizer.kind: optimizer.kind=sgd",
        ),
        (
            {"space": {"precision": ["fp32", "bf16"]}, "engine": "packed"},
            "",
            "space.precision: precision=bf16",
        ),
        (
            {"space": {"optimizer.lr": {"log": [1e-3, 1]}, "model.width": [4, 8]}, "scheduler": "pbt"},
            "",
            "space.model.width: scheduler.kind=pbt hands trained parameters",
        ),
    ],
)
def test_the_engine_is_the_one_that_can(changes, engine, why):
    changes = {"objectives": {"eval/cross_entropy": "min"}, **changes}
    spec = tiny_sweep(**changes)
    if why is None:
        assert engine_of(spec, spec.make_space()) == engine
    else:
        with pytest.raises(UserError, match=why):
            engine_of(spec, spec.make_space())


@pytest.mark.parametrize("search", ["random", "grid", "tpe"])
def test_what_ray_tune_asks_travels_between_processes(search, tmp_path):
    """Whatever the search, behind configurations that have been begun as well."""
    spec = tiny_sweep(search=search, engine="ray")
    source = Source(spec, sweep_at(spec, tmp_path).trials, [], Proposals(spec, spec.make_space()))
    first = source.suggest("a")
    again = copy.deepcopy(source)

    assert again.suggest("b") == source.suggest("b") != first


@pytest.mark.slow
@pytest.mark.parametrize("search", ["random", "grid", "tpe"])
@pytest.mark.parametrize("scheduler", ["none", "asha", "hyperband", "median"])
@pytest.mark.parametrize("engine", ["packed", "ray"])
def test_every_pair_of_search_and_scheduler_ends(engine, scheduler, search, at_home, cluster):
    """By both engines, with all configurations at their ends or stopped."""
    changes = {"search": {"kind": search, "points": 2}, "scheduler": {"kind": scheduler, "grace_steps": 4}}
    spec = tiny_sweep(losses=["comp-sum"], trials=2, engine=engine, at_once=2, confirm={"top": 0}, **changes)
    found = sweep(spec).results

    assert len(found.trials) == len(spec.make_space().anchors()) + (4 if search == "grid" else 2)
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}


@pytest.mark.slow
def test_ray_tune_gives_what_packed_trials_give(at_home, cluster, tmp_path):
    """Every trial a run of Ray Train: the same configurations, and the same metrics to rounding."""
    spec = tiny_sweep(losses=["comp-sum"], trials=1, engine="ray", at_once=2, confirm={"top": 0})
    ours = packed(spec, tmp_path)
    theirs = sweep(spec).results

    assert [t.configuration for t in ours.trials] == [t.configuration for t in theirs.trials]
    assert [t.status for t in theirs.trials] == ["finished", "finished"]
    for one, other in zip(ours.trials, theirs.trials, strict=True):
        assert [row["step"] for row in one.rows] == [row["step"] for row in other.rows]
        for name in ("eval/accuracy", "eval/cross_entropy", "eval/loss"):
            assert other.value(name) == pytest.approx(one.value(name), rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_the_local_objective_of_a_federation_is_searched(at_home, cluster):
    """Its rounds are the steps; early stopping and seeds are as for any other training."""
    base = {
        "strategies": ["fedavg"],
        "rounds": 4,
        "split": {"clients": 5, "alpha": 0.3},
        "model": {"width": 8, "layers": 1},
        "local": {"epochs": 1},
    }
    spec = SweepSpec.parse(
        {
            "base": base,
            "losses": ["cross-entropy", "comp-sum"],
            "space": {"local.lr": {"log": [0.01, 0.3]}},
            "objectives": {"server/accuracy": "max"},
            "scheduler": {"kind": "asha", "reduction": 2},
            "trials": 6,
            "seeds": [0, 1],
            "confirm": {"top": 1, "seeds": [5]},
        }
    )
    found = sweep(spec).results

    assert len(found.trials) == 8
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}
    assert all([row["step"] for row in t.rows] == list(range(1, 9)) for t in found.ranked)
    assert found.confirmed


@pytest.mark.slow
def test_a_killed_sweep_of_ray_tune_goes_on(at_home, tmp_path):
    """Trials that had ended are kept as they are, those that had begun go on from their checkpoints."""
    spec = tiny_sweep(losses=["comp-sum"], trials=3, engine="ray", seeds=[0, 1], name="by-ray", at_once=2)
    spec = SweepSpec.parse({**spec.model_dump(mode="json"), "confirm": {"top": 0}})
    folder = killed(at_home, write_spec(tmp_path, spec), ended=1)
    kept = {
        file.parent.name: read_all(file.parent / "metrics.jsonl") for file in folder.glob("trials/*/end.json")
    }
    again = [*COMMAND, "tune", "--resume", str(folder)]
    subprocess.run(again, check=True, env=os.environ, timeout=300)
    found: Results = results(spec, folder)

    assert [trial.status for trial in found.trials] == ["finished"] * 4
    assert all(read_all(folder / "trials" / name / "metrics.jsonl") == rows for name, rows in kept.items())
    assert [len(trial.finals) for trial in found.trials] == [2] * 4
