"""Real nodes with a job server on this machine: submitting, following, stopping, and what nodes can lose."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from lossworks.runs import run_of
from lossworks_jobs.clusters.local_nodes import start_nodes
from lossworks_testing.clusters import (
    blind_node,
    cli,
    command,
    curve,
    job_of,
    listening,
    lose,
    notices,
    processes_of,
    run_at,
    until,
)

pytestmark = pytest.mark.timeout(420)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster_home(tmp_path_factory):
    """The home folder of client and nodes: storage that all share."""
    return tmp_path_factory.mktemp("cluster-home")


@pytest.fixture(scope="module")
def nodes(cluster_home):
    """Two nodes of one logical CPU each, so that two workers need both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(cluster_home))
        patch.delenv("RAY_ADDRESS", raising=False)
        # A lost node is noticed in seconds instead of half a minute.
        quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
        with start_nodes(
            2, cpus=1, port=0, dashboard_port=0, logs=cluster_home / "cluster", environment=quick
        ) as nodes:
            yield nodes


@pytest.fixture
def here(cluster_home, monkeypatch):
    """The client's environment."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(cluster_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return cluster_home


@pytest.fixture
def file(spec, tmp_path):
    """The small run's spec; the text that it names is this machine's."""
    path = tmp_path / "spec.yaml"
    path.write_text(spec.to_yaml())
    return path


@pytest.fixture(scope="module")
def submitted(nodes, cluster_home, spec, tmp_path_factory):
    """A run that was submitted and left alone: its output, exit status and folder."""
    file = tmp_path_factory.mktemp("spec") / "spec.yaml"
    file.write_text(spec.to_yaml())
    log = file.with_name("log")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        status = command("submit", str(file), "--address", nodes.jobs, home=cluster_home, log=log).wait(240)
    return log.read_text(), status, run_of(cluster_home / "jobs" / job_of(log))


def test_a_submitted_run_ends_as_one_here(submitted, cluster_home):
    """Code, spec and text arrive; progress, the MLflow run and the exit status come back."""
    output, status, folder = submitted

    assert status == 0, output
    assert re.search(rf"^lossworks: run {folder.run_id} in MLflow at sqlite:", output, re.MULTILINE)
    assert "step 120/120" in output
    assert re.search(r"^job small-\w{8} succeeded$", output, re.MULTILINE)
    assert len(curve(folder)) == 120
    assert folder.spec().data.corpus.startswith(f"text:{cluster_home}/uploads/")
    assert (cluster_home / "ray-token").stat().st_mode & 0o077 == 0


def test_the_clusters_token_is_in_no_log(submitted, nodes, cluster_home):
    """Neither the nodes' own files nor those of a run hold it, but for the file that it is in."""
    token = (cluster_home / "ray-token").read_bytes()
    folders = (cluster_home, nodes.discovery.parent.parent)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    assert len(files) > 100
    assert {path.name for path in files if token in path.read_bytes()} == {"ray-token"}


def test_a_stopped_job_leaves_a_checkpoint_and_is_resumed_to_the_same_end(nodes, here, file, tmp_path):
    """`jobs stop` is a notice before the end, as of a machine that goes away; --resume JOB ends the run."""
    log, again, whole = (tmp_path / name for name in ("log", "again", "whole"))
    steps = 600  # more than the seconds take that a notice needs to arrive
    assert start(file, nodes, here, whole, f"steps={steps}")[0].wait(240) == 0
    process, job = start(file, nodes, here, log, f"steps={steps}")
    folder = run_at(here, job, 30)

    assert cli("jobs", "stop", job, "--address", nodes.jobs, home=here)[0] == 0
    assert process.wait(60) == 130
    stopped_at = curve(folder)[-1][0]
    assert 30 <= stopped_at < steps
    assert (folder.checkpoints / f"step-{stopped_at:08d}" / "manifest.json").is_file()
    status, printed = cli("jobs", "status", job, "--address", nodes.jobs, home=here)
    assert (status, f"job {job} stopped" in printed) == (130, True)
    assert command("submit", "--resume", job, "--address", nodes.jobs, home=here, log=again).wait(240) == 0
    assert curve(folder) == curve(run_of(here / "jobs" / job_of(whole)))


def start(file, nodes, here, log, *overrides):
    """Submit a spec and return the client's process and the job's id."""
    process = command("submit", str(file), *overrides, "--address", nodes.jobs, home=here, log=log)
    return process, job_of(log)


def test_a_killed_driver_is_resubmitted_and_changes_nothing(submitted, nodes, here, file, tmp_path):
    """kill -9 of the job's process: the client sees it fail, and --resume ends with the very same curve."""
    process, job = start(file, nodes, here, tmp_path / "log")
    folder = run_at(here, job, 30)
    for driver in processes_of(nodes, "lossworks_jobs.submission.job_entry"):
        driver.kill()

    assert process.wait(60) == 137
    assert "submit --resume" in (tmp_path / "log").read_text()
    again = command("submit", "--resume", job, "--address", nodes.jobs, home=here, log=tmp_path / "again")
    assert again.wait(240) == 0
    assert curve(folder) == curve(submitted[2])


def test_a_second_job_waits_for_room(nodes, here, file, tmp_path):
    """There is room for one at a time; the second says what it waits for and starts when the first ends."""
    first, job = start(file, nodes, here, tmp_path / "first", "steps=100000")
    run_at(here, job, 1)
    second, waiting = start(file, nodes, here, tmp_path / "second", "steps=60")
    until(lambda: "waiting for 2 CPU, of which 0 are free" in (tmp_path / "second").read_text(), "the notice")

    assert cli("jobs", "stop", job, "--address", nodes.jobs, home=here)[0] == 0
    assert (first.wait(60), second.wait(200)) == (130, 0)
    assert len(curve(run_of(here / "jobs" / waiting))) == 60


def test_a_job_that_can_not_work_returns_its_exit_status(nodes, here, file):
    """A mistake that only the cluster can see is told in one line, with the command line's status for it."""
    missing = [str(file), "data.corpus=text:/nowhere.txt", "--no-upload"]
    status, printed = cli("submit", *missing, "--address", nodes.jobs, home=here)

    assert status == 2
    assert "lossworks: error: data.corpus=text:/nowhere.txt: no such file" in printed
    assert "Traceback" not in printed
    assert "FAILED" in cli("jobs", "list", "--address", nodes.jobs, home=here)[1]


def test_a_lost_node_is_waited_for(submitted, nodes, here, file, tmp_path):
    """Without elastic training a run goes on when a node takes the lost one's place, to the same curve."""
    process, job = start(file, nodes, here, tmp_path / "log")
    folder = run_at(here, job, 30)
    lose(nodes.processes[1])
    until(lambda: "starting again once all 2 workers have room" in notices(folder), "the notice")
    steps = len(curve(folder))
    nodes.add(1)

    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert steps < 120
    assert "lost rank" in (tmp_path / "log").read_text()
    assert curve(folder) == curve(submitted[2])


def test_an_elastic_run_goes_on_with_what_is_left_and_grows_again(nodes, here, file, tmp_path):
    """One of two nodes is lost: one worker goes on; a node joins: two go on. The loss is that of any run."""
    long = ("elastic={min_workers: 1, resize_every_s: 3}", "steps=100000", "checkpoint.every=25")
    process, job = start(file, nodes, here, tmp_path / "log", *long)
    folder = run_at(here, job, 40)
    lose(nodes.processes[-1])
    run_at(here, job, curve(folder)[-1][0] + 60)
    restarts = notices(folder).count("going on from step")
    nodes.add(1)
    until(lambda: notices(folder).count("going on from step") > restarts, "more workers")
    run_at(here, job, curve(folder)[-1][0] + 30)

    assert cli("jobs", "stop", job, "--address", nodes.jobs, home=here)[0] == 0
    assert process.wait(60) == 130
    steps = [step for step, _ in curve(folder)]
    assert steps == list(range(1, len(steps) + 1))
    assert "starting again once at least 1 of them have room" in notices(folder)
    assert curve(folder)[-1][1] < curve(folder)[0][1] - 2


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0,
    reason="needs the right to hide folders from a process (unshare --mount)",
)
def test_a_node_without_the_shared_storage_ends_the_job_in_a_line(here, file, tmp_path, monkeypatch):
    """The node has a file system of its own: the job fails with the node, the folder and what to do."""
    home, log = tmp_path / "home", tmp_path / "log"
    monkeypatch.setenv("LOSSWORKS_HOME", str(home))
    with (
        start_nodes(1, cpus=1, port=0, dashboard_port=0, logs=tmp_path / "logs") as nodes,
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary,
        blind_node(nodes, home, Path(temporary), tmp_path / "node.log"),
    ):
        status = command("submit", str(file), "--address", nodes.jobs, home=home, log=log).wait(200)
    printed = log.read_text()

    assert status == 1, printed
    assert f"{home}/runs/" in printed
    assert re.search(
        r"^lossworks: error: run \w+: .* can't be seen on node \S+; all nodes must", printed, re.M
    )
    assert "lost rank" not in printed  # nobody is, and trying again would change nothing
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("spec_file", "overrides", "ends_with"),
    [
        (
            "tune/specs/label-noise.yaml",
            ["trials=4", "base.steps=40", "losses=[cross-entropy,ldr]", "confirm={top: 1, seeds: [9]}"],
            "best.yaml",
        ),
        ("federated/specs/digits.yaml", ["rounds=3", "seeds=[0]"], "spec.yaml"),
    ],
)
def test_sweeps_and_federations_are_submitted_like_trainings(
    spec_file, overrides, ends_with, nodes, here, tmp_path
):
    """The same command sends any spec; the run is in the home folder that all share."""
    process, job = start(spec_file, nodes, here, tmp_path / "log", *overrides)

    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    folder = run_of(here / "jobs" / job)
    assert f"lossworks: run {folder.run_id} in MLflow" in (tmp_path / "log").read_text()
    assert (folder.path / ends_with).is_file()


def test_a_cluster_refuses_whoever_has_no_token(nodes, here, monkeypatch):
    """The client's error says how to get in."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-somebody-else")
    status, printed = cli("jobs", "list", "--address", nodes.jobs, home=here)

    assert status == 2
    assert "the cluster refuses our token" in printed


def test_a_run_of_its_own_lets_nobody_in(file, tmp_path, monkeypatch):
    """Ray, started by `lossworks train`, listens on all interfaces and answers its own processes alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    run = command("train", str(file), "steps=100000", home=tmp_path / "home", log=tmp_path / "log")
    until(lambda: "step 1/" in (tmp_path / "log").read_text(), "the first step")
    ports = listening(run.pid, "gcs_server")
    code = (
        "from ray._raylet import GcsClient; from ray._private.gcs_utils import *; import sys;"
        "GcsClient(address=f'127.0.0.1:{sys.argv[1]}').check_alive([], 5)"
    )
    stranger = subprocess.run(
        [sys.executable, "-c", code, str(ports[0])], capture_output=True, text=True, timeout=60, check=False
    )
    run.terminate()

    assert run.wait(60) == 130
    assert stranger.returncode != 0
    assert "Unauthenticated" in stranger.stderr


def test_a_cluster_ends_with_its_command(tmp_path):
    """Also where that is killed without a word: no node stays behind with its ports."""
    log = tmp_path / "log"
    process = command("cluster", "--port", "0", "--dashboard-port", "0", home=tmp_path / "home", log=log)
    until(lambda: "Ctrl-C ends all nodes" in log.read_text(), "a cluster")
    members = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()

    assert {"gcs_server", "raylet"} <= {member.name() for member in members}
    assert psutil.wait_procs(members, timeout=30)[1] == []
