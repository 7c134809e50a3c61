"""Runs whose driver was killed: MLflow is told, and the person gets the command that goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest

from lossworks.lost_runs import settle_lost_runs
from lossworks.runs import RunFolder
from lossworks.tasks import parse_train_spec
from lossworks.tracking import create_run
from lossworks.tracking.client import connect
from lossworks_testing.classification import tiny

DRIVER = """
import sys, time
from pathlib import Path
from lossworks.lost_runs import watched
from lossworks.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
with folder.hold(), watched(folder):
    print("holds", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """A home folder with one store for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def folder():
    """A run that is entered in MLflow, with a run below it."""
    spec = parse_train_spec(tiny(name="lost"))
    run_id = create_run(spec.tracking, name=spec.name, parameters={}, tags={})
    create_run(spec.tracking, name="below", parameters={}, tags={"mlflow.parentRunId": run_id})
    return RunFolder.create(spec, run_id)


@contextmanager
def driver(folder, log, seconds=60.0, code=DRIVER):
    """Start a process that holds the run, and wait until it does."""
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder.path), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    assert process.stdout.readline() == b"holds\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def statuses(folder):
    client = connect(folder.spec().tracking)
    run = client.get_run(folder.run_id)
    below = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{folder.run_id}'")
    return [one.info.status for one in (run, *below)]


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_driver_leaves_the_right_status_and_a_way_on(folder, tmp_path):
    """Also of the runs below it; after that the run is free, and nothing is left to see to."""
    log = tmp_path / "log"
    with driver(folder, log) as process:
        process.kill()
        wait_for(lambda: "\n" in log.read_text())

    said = log.read_text()
    assert said.startswith(f"lossworks: run {folder.run_id}: its driver was killed")
    assert said.endswith(f"train --resume {folder.run_id}\n")
    assert "Traceback" not in said
    assert statuses(folder) == ["KILLED", "KILLED"]
    assert not folder.was_lost()
    with folder.hold():
        pass


def test_a_driver_that_ends_says_nothing_more(folder, tmp_path):
    """Its own last words stand."""
    with driver(folder, tmp_path / "log", seconds=0.0) as process:
        assert process.wait(60) == 0

    assert (tmp_path / "log").read_text() == ""
    assert statuses(folder) == ["RUNNING", "RUNNING"]
    assert not folder.was_lost()


def test_after_a_power_cut_the_next_command_sees_to_it(folder, tmp_path):
    """The process beside the driver is gone, too; a run that somebody works on is left alone."""
    with driver(folder, tmp_path / "log") as process:
        assert settle_lost_runs() == []
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for one in reversed(family):
            os.kill(one.pid, signal.SIGKILL)
    assert folder.was_lost()

    said = settle_lost_runs()

    assert [folder.run_id in text for text in said] == [True]
    assert statuses(folder) == ["KILLED", "KILLED"]
    assert settle_lost_runs() == []


def test_a_run_that_had_ended_is_brought_up_to_date(folder, tmp_path):
    """It has nothing to go on with: what MLflow lacks is delivered."""
    folder.outcome_file.write_text("{}")
    with driver(folder, tmp_path / "log") as process:
        process.kill()
        wait_for(lambda: "\n" in (tmp_path / "log").read_text())

    assert f"sync {folder.run_id}\n" in (tmp_path / "log").read_text()


def test_whoever_goes_on_waits_while_a_lost_run_is_seen_to(folder, tmp_path):
    """It takes seconds, and a person may be as quick."""
    with driver(folder, tmp_path / "log") as process:
        process.kill()
        process.wait()
        code = DRIVER.replace("hold()", "hold(briefly=True)").replace("watched(folder)", "nullcontext()")
        with driver(folder, tmp_path / "log", 2.0, f"from contextlib import nullcontext\n{code}"):
            begun = time.monotonic()
            with folder.hold():
                assert time.monotonic() - begun > 0.5
