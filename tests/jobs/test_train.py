"""Training on a real Ray instance: results, tracking, lost workers, interruptions, resuming."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from lossworks.cli import main
from lossworks.errors import RunError
from lossworks.models import load_classifier
from lossworks.runs import RunFolder
from lossworks.tracking import read_all
from lossworks.tracking.client import connect
from lossworks.training.checkpoints.manifest import find_damage
from lossworks.training.outcome import Outcome
from lossworks_jobs.clusters.ray_cluster import OwnNode, is_there
from lossworks_jobs.training.train import train
from lossworks_testing.clusters import descendants_of, until
from lossworks_testing.terminal import Terminal

pytestmark = pytest.mark.timeout(240)

SLOW = pytest.mark.slow
ONLY_DDP = pytest.mark.parametrize("finished", ["ddp", pytest.param("fsdp", marks=SLOW)], indirect=True)


@pytest.fixture(scope="module")
def finished_runs():
    """Uninterrupted runs by sharding; pytest would make one anew for each change of the parameter."""
    return {}


@pytest.fixture(params=["ddp", pytest.param("fsdp", marks=SLOW)])
def finished(request, cluster, spec, home, finished_runs):
    """An uninterrupted run, for each way of sharding."""
    if request.param not in finished_runs:
        finished_runs[request.param] = train(spec.override([f"sharding={request.param}"]))
    return finished_runs[request.param]


def curve(folder: RunFolder):
    return [(row["step"], row["metrics"]["train/loss"]) for row in read_all(folder.journal)]


def tracked(spec, run_id):
    return connect(spec.tracking).get_run(run_id)


def newest(home) -> RunFolder:
    """Return the run whose folder was made last."""
    return RunFolder(max((home / "runs").iterdir(), key=lambda path: path.stat().st_ctime_ns))


def when_step(home, step, action, seen=frozenset()):
    """Call ``action`` once the newest run, if not in ``seen``, has journaled ``step``; return the thread."""

    def watch():
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            folder = newest(home)
            if folder.path not in seen and any(at >= step for at, _ in curve(folder)):
                action(folder)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_a_worker(_folder=None):
    """Kill a worker of the Ray instance that this process started; other runs have their own."""
    descendants_of(os.getpid(), "ray::RayTrainWorker")[-1].kill()


def test_a_run_ends_in_mlflow_with_all_it_should_have(finished, home, spec):
    """MLflow's own client reads back status, parameters, whole curves and artifacts."""
    run = tracked(spec, finished.folder.run_id)
    client = connect(spec.tracking)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}

    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "32"
    assert run.data.tags["lossworks.folder"] == str(finished.folder.path)
    assert "lossworks.version.torch" in run.data.tags or any("torch" in tag for tag in run.data.tags)
    assert sorted((point.step, point.value) for point in history) == curve(finished.folder)
    assert len(history) == spec.steps
    assert artifacts >= {"report.png", "spec.yaml", "outcome.json"}
    assert {
        "eval/loss",
        "train/lr",
        "train/tokens_per_second",
        "train/step_seconds",
    } <= run.data.metrics.keys()


def test_a_run_learns(finished, spec):
    """Two workers bring the loss down, and the result says where the checkpoint is."""
    losses = [loss for _, loss in curve(finished.folder)]

    assert losses[-1] < losses[0] - 2
    assert finished.outcome.status == "finished"
    assert finished.outcome.checkpoint.endswith("step-00000120")
    assert list(finished.start_up) == ["data and Ray", "MLflow", "workers", "first step"]
    assert min(finished.start_up.values()) >= 0
    assert finished.folder.report.read_bytes().startswith(b"\x89PNG")


def test_a_killed_worker_is_replaced_and_changes_nothing(finished, home, cluster):
    """kill -9 in mid-run: the run ends with the very curve of the run that was left alone."""
    spec = finished.folder.spec()
    before = set((home / "runs").iterdir())
    killer = when_step(home, 30, kill_a_worker, seen=before)
    result = train(spec)
    killer.join(1)

    assert not killer.is_alive()
    assert result.outcome.status == "finished"
    assert any("going on from step" in notice for notice in result.notices)
    assert curve(result.folder) == curve(finished.folder)
    assert result.outcome.metrics["eval/loss"] == finished.outcome.metrics["eval/loss"]
    assert tracked(spec, result.folder.run_id).info.status == "FINISHED"


@SLOW
@ONLY_DDP
def test_too_many_lost_workers_fail_the_run_and_a_resume_saves_it(finished, home, cluster):
    """With no replacement allowed the run is FAILED in MLflow; resumed, it ends as if nothing had been."""
    spec = finished.folder.spec().override(["max_failures=0"])
    killer = when_step(home, 30, kill_a_worker, seen=set((home / "runs").iterdir()))
    with pytest.raises(RunError, match="rank"):
        train(spec)
    killer.join(1)
    folder = newest(home)
    failed = tracked(spec, folder.run_id)
    result = train(spec.override(["workers=1"]), resume=folder)

    assert failed.info.status == "FAILED"
    assert "rank" in failed.data.tags["lossworks.reason"]
    assert tracked(spec, folder.run_id).info.status == "FINISHED"
    assert [step for step, _ in curve(folder)] == list(range(1, 121))
    # One worker sums in another order than two.
    assert result.outcome.metrics["eval/loss"] == pytest.approx(
        finished.outcome.metrics["eval/loss"], rel=1e-3
    )


def lossworks(*arguments, home, address=None):
    """Start the command as a user would, on the tests' Ray instance or with one of its own."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    variables = {**os.environ, "RAY_ADDRESS": address} if address else variables
    environment = {**variables, "LOSSWORKS_HOME": str(home)}
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; from lossworks.cli import main; sys.exit(main())", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("finished", "number"),
    [
        pytest.param("ddp", signal.SIGINT, marks=SLOW),
        pytest.param("fsdp", signal.SIGKILL, marks=SLOW),
        pytest.param("ddp", signal.SIGKILL, marks=SLOW),
        pytest.param("fsdp", signal.SIGINT, marks=SLOW),
    ],
    indirect=["finished"],
)
def test_an_interrupted_command_is_resumed_to_the_same_end(finished, home, cluster, tmp_path, number):
    """Ctrl-C saves a checkpoint and ends as KILLED; after that, and after kill -9, --resume ends the run."""
    file = tmp_path / "spec.yaml"
    file.write_text(finished.folder.spec().to_yaml())
    before = set((home / "runs").iterdir())
    process = lossworks("train", str(file), home=home, address=cluster)
    killer = when_step(home, 30, lambda _: process.send_signal(number), seen=before)
    output, _ = process.communicate(timeout=120)
    killer.join(1)
    folder = newest(home)
    status = tracked(folder.spec(), folder.run_id).info.status
    stopped_at = curve(folder)[-1][0]
    again = lossworks("train", "--resume", folder.run_id[:12], home=home, address=cluster)
    text, _ = again.communicate(timeout=120)

    assert 30 <= stopped_at < 120, output
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert status == "KILLED"
        assert "lossworks train --resume" in output
    assert again.returncode == 0, text
    assert curve(folder) == curve(finished.folder)
    assert tracked(folder.spec(), folder.run_id).info.status == "FINISHED"


def test_a_node_that_is_gone_for_long_is_noticed(monkeypatch):
    """Where Ray's library waits for ever, as it did once after a hang-up."""
    monkeypatch.setattr("lossworks_jobs.clusters.ray_cluster._LOST_AFTER_S", 0.2)
    code = "import time; open('/proc/self/comm', 'w').write('raylet'); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", code]) as raylet:
        until(lambda: psutil.Process(raylet.pid).name() == "raylet", "its name")
        node = OwnNode()
        node._raylet = psutil.Process(raylet.pid)  # not that of the tests' own cluster
        there = node.lost
        raylet.kill()
        until(lambda: node.lost, "the loss")

    assert not there


@SLOW
def test_a_signal_to_the_whole_group_ends_a_run_with_the_way_on(spec, tmp_path):
    """As schedulers and systemd stop a job: Ray's processes get it, too, in whichever order."""
    file, home = tmp_path / "spec.yaml", tmp_path / "home"
    file.write_text(spec.to_yaml())
    process = lossworks("train", str(file), "steps=100000", home=home)
    until(lambda: list(home.glob("runs/*/metrics.jsonl")), "a run")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    folder = RunFolder(next(home.glob("runs/*")))

    assert process.returncode in (1, 130)
    assert "a mistake of Lossworks" not in output
    assert f"--resume {folder.run_id}" in output


@SLOW
@pytest.mark.parametrize("server", ["raylet/raylet", "gcs_server"])
def test_a_run_whose_node_is_lost_ends_with_the_way_on(spec, tmp_path, server):
    """Ray then ends the driver, which can say nothing more: its last line and MLflow's status are there."""
    file, home = tmp_path / "spec.yaml", tmp_path / "home"
    file.write_text(spec.to_yaml())
    process = lossworks("train", str(file), "steps=100000", home=home)
    until(lambda: list(home.glob("runs/*/metrics.jsonl")), "a run")
    descendants_of(process.pid, server)[0].kill()
    output, _ = process.communicate(timeout=180)
    folder = RunFolder(next(home.glob("runs/*")))

    assert process.returncode == 1
    assert output.splitlines()[-1].endswith(f"train --resume {folder.run_id}")
    assert not folder.was_lost()


@SLOW
def test_a_run_whose_terminal_is_closed_is_saved(spec, tmp_path, monkeypatch):
    """Ray's own processes, started in the same terminal, outlive it until the checkpoint is there."""
    file, home = tmp_path / "spec.yaml", tmp_path / "home"
    monkeypatch.setenv("LOSSWORKS_HOME", str(home))
    file.write_text(spec.to_yaml())
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    code = "import sys; from lossworks.cli import main; sys.exit(main())"
    terminal = Terminal(
        [sys.executable, "-c", code, "train", str(file), "steps=100000"],
        variables | {"LOSSWORKS_HOME": str(home)},
    )
    until(lambda: list(home.glob("runs/*/metrics.jsonl")), "a run")
    folder = newest(home)
    until(lambda: len(curve(folder)) > 30, "some steps")
    processes = psutil.Process(terminal.pid).children(recursive=True)

    assert terminal.close() == 130
    stopped_at = curve(folder)[-1][0]
    assert (folder.checkpoints / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    assert tracked(folder.spec(), folder.run_id).info.status == "KILLED"
    until(lambda: not any(map(is_there, processes)), "the end of Ray", seconds=30)


@SLOW
def test_a_run_that_diverges_fails_and_names_step_rank_and_checkpoint(spec, cluster, home, tmp_path, capsys):
    """A decay that blows the parameters up is reported in one line, with exit status 1 and in MLflow."""
    file = tmp_path / "spec.yaml"
    changes = ["optimizer.lr=1", "optimizer.weight_decay=1e6", "checkpoint.every=1", "steps=50"]
    file.write_text(spec.override(changes).to_yaml())
    status = main(["train", str(file)])
    error = capsys.readouterr().err
    folder = newest(home)
    run = tracked(folder.spec(), folder.run_id)

    assert status == 1
    assert re.fullmatch(
        rf"lossworks: error: run {folder.run_id}: the .* became NaN or infinite at step \d+ on rank 0, 1; "
        rf"the last good checkpoint is {folder.checkpoints}/step-\d+\n",
        error,
    )
    assert run.info.status == "FAILED"
    assert "NaN or infinite" in run.data.tags["lossworks.reason"]


@SLOW
@ONLY_DDP
def test_storage_that_fails_for_a_while_costs_nothing(finished, home, cluster):
    """The folder of checkpoints goes away under the run and comes back: the run waits, and ends the same."""
    moved = []

    def take_away(folder):
        moved.append(folder.checkpoints.rename(folder.path / "moved"))
        folder.checkpoints.write_text("a file where a folder should be")
        deadline = time.monotonic() + 60
        while not (folder.notices.is_file() and "storage refuses" in folder.notices.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        folder.checkpoints.unlink()
        moved[0].rename(folder.checkpoints)

    thief = when_step(home, 30, take_away, seen=set((home / "runs").iterdir()))
    result = train(finished.folder.spec())
    thief.join(1)

    assert moved
    assert not thief.is_alive()
    assert any("storage refuses the checkpoint" in notice for notice in result.notices)
    assert curve(result.folder) == curve(finished.folder)
    assert result.outcome.metrics["eval/loss"] == finished.outcome.metrics["eval/loss"]


@SLOW
@ONLY_DDP
def test_storage_that_fails_for_good_ends_the_run_in_one_line(finished, home, cluster, tmp_path, capsys):
    """After the spec's patience: exit status 1, the cause, FAILED in MLflow, and whole checkpoints."""
    file = tmp_path / "spec.yaml"
    file.write_text(finished.folder.spec().override(["checkpoint.patience_s=1"]).to_yaml())

    def take_away(folder):
        folder.checkpoints.rename(folder.path / "moved")
        folder.checkpoints.write_text("a file where a folder should be")

    when_step(home, 30, take_away, seen=set((home / "runs").iterdir()))
    status = main(["train", str(file)])
    error = capsys.readouterr().err
    folder = newest(home)

    assert status == 1
    assert "can't be written" in error
    assert "Traceback" not in error
    assert tracked(folder.spec(), folder.run_id).info.status == "FAILED"
    assert find_damage(max((folder.path / "moved").glob("step-*"))) is None


def test_an_exported_model_evaluates_to_the_runs_own_loss(finished, home, tmp_path):
    """export, then evaluate on all held-out text that the run's last evaluation read."""
    run, folder, result = finished.folder.run_id, tmp_path / "model", tmp_path / "result.json"

    assert main(["export", run, "--to", str(folder), "--newest"]) == 0
    assert main(["evaluate", str(folder), "--sequences", "8", "--json", str(result)]) == 0
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads(result.read_text())["eval/loss"] == pytest.approx(
        finished.outcome.metrics["eval/loss"], rel=1e-5
    )


@SLOW
def test_a_split_head_trains_and_is_exported(spec, cluster, home, tmp_path):
    """sharding.vocab_parallel=true on two Ray workers; the export evaluates to the run's own loss."""
    split = ["sharding=fsdp", "sharding.vocab_parallel=true", "model.tied=false"]
    result = train(spec.override([*split, "steps=20"]))
    folder, file = tmp_path / "model", tmp_path / "result.json"

    assert tracked(spec, result.folder.run_id).data.params["sharding.vocab_parallel"] == "True"
    assert main(["export", result.folder.run_id, "--to", str(folder)]) == 0
    assert main(["evaluate", str(folder), "--sequences", "8", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["eval/loss"] == pytest.approx(
        result.outcome.metrics["eval/loss"], rel=1e-5
    )


def test_the_stored_spec_starts_the_same_run_again(finished, home):
    """A run's spec.yaml is the whole resolved spec."""
    assert finished.folder.spec().to_yaml() == finished.folder.spec_file.read_text()


def test_a_resume_with_another_shape_is_refused(finished, home):
    """The error names the field and both values; so does one that is complete."""
    from lossworks.errors import UserError

    with pytest.raises(UserError, match=r"model.width=64: the checkpoints of run .* were made with 32"):
        train(finished.folder.spec().override(["model.width=64"]), resume=finished.folder)
    with pytest.raises(UserError, match=r"start=\S*other: the checkpoints of .* were made with None"):
        train(finished.folder.spec().override(["start=other"]), resume=finished.folder)
    with pytest.raises(UserError, match="has finished its 120 steps"):
        train(finished.folder.spec(), resume=finished.folder)


def test_a_classifier_trains_through_the_same_command(cluster, home, tmp_path, capsys):
    """The digits that ship, with another loss: figures on the terminal, in MLflow and in the picture."""
    arguments = ["train", "jobs/specs/digits.yaml", "steps=40", "loss=comp-sum", "loss.tau=1.5"]
    assert main([*arguments, "schedule.warmup_steps=1", "tracking.system_metrics=false"]) == 0
    printed = capsys.readouterr().out
    folder = newest(home)
    run = tracked(folder.spec(), folder.run_id)

    assert "held-out accuracy" in printed
    assert "(comp-sum)" in printed
    assert re.search(r"^where the time went: \w+ \d+ %, \w+ \d+ %", printed, re.MULTILINE)
    assert re.search(r"^MFU of the last step: \S+ of the measured peak$", printed, re.MULTILINE)
    assert run.data.params["loss.tau"] == "1.5"
    assert run.data.metrics["eval/accuracy"] > 0.6
    assert run.data.metrics["eval/cross_entropy"] > 0
    assert sum(Outcome.stored(folder.outcome_file).pictured["reliability"]["examples"]) == 450
    assert folder.report.is_file()
    assert main(["export", folder.run_id, "--to", str(tmp_path / "model")]) == 0
    assert len(load_classifier(tmp_path / "model").names) == 10


def test_examples_of_the_folder_that_one_is_in_are_found(cluster, home, tmp_path, monkeypatch, capsys):
    """Workers have other working folders; what is stored names the file wherever one is later."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{number % 7},{number % 3},{'ab'[number % 2]}\n" for number in range(40))
    (tmp_path / "flowers.csv").write_text(f"x,y,species\n{rows}")
    (tmp_path / "spec.yaml").write_text("{task: classification, workers: 1, sharding: none, steps: 12}")
    overrides = ["data.source=csv:flowers.csv", "data.label=species", "batch_size=8"]

    assert main(["train", "spec.yaml", *overrides]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    assert newest(home).spec().data.source == f"csv:{tmp_path / 'flowers.csv'}"
