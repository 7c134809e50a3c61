"""The logs of a run: JSON lines without secrets, bounded, and harmless where the disk is full."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lossworks import logs
from lossworks.cli import main
from lossworks.commands.logs import LogReader
from lossworks.logs import EVENTS, fields, writing_logs
from lossworks.runs import RunFolder
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training


def lines(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run's folder, found by its id."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    folder = RunFolder(tmp_path / "home" / "runs" / "abc123")
    folder.path.mkdir(parents=True)
    folder.spec_file.write_text("name: talkative\n")
    return folder


def test_a_line_has_all_that_is_asked_of_it(tmp_path):
    """Time in UTC, level, run, rank, host, step, message and fields, numbers as numbers."""
    with writing_logs(tmp_path, run="r1", who=3):
        EVENTS.info("evaluated", extra=fields(step=7, loss=1.5, ranks=(0, 2), worst=math.nan))
    EVENTS.info("after the end")
    (line,) = lines(tmp_path / "rank-3.jsonl")

    assert line["time"].endswith("+00:00")
    assert line.pop("time") < "3"
    assert line.pop("host")
    assert line == {
        "level": "INFO",
        "run": "r1",
        "rank": 3,
        "step": 7,
        "message": "evaluated",
        "loss": 1.5,
        "ranks": [0, 2],
        "worst": "nan",
    }


def test_secrets_are_nowhere(tmp_path, monkeypatch, capsys):
    """Neither in messages, fields, errors or what is echoed; short values and other variables stay."""
    monkeypatch.setenv("STORE_PASSWORD", "hunter2-long")
    monkeypatch.setenv("my_api_key", "hunter2")
    monkeypatch.setenv("TINY_KEY", "step")
    monkeypatch.setenv("COLOUR", "turquoise")
    with writing_logs(tmp_path, run="r", who="driver", echo=True):
        EVENTS.info(
            "at https://me:pass@host with hunter2-long", extra=fields(hunter2=["x hunter2 y"], step=1)
        )
        try:
            raise ValueError("hunter2-long in a turquoise step")
        except ValueError:
            EVENTS.exception("failed")
    text = (tmp_path / "driver.jsonl").read_text() + capsys.readouterr().err

    assert "hunter2" not in text
    assert "me:pass" not in text
    assert text.count("https://***@host") == 2
    assert "ValueError: *** in a turquoise step" in text


def test_a_full_disk_ends_no_run(tmp_path, capsys):
    """Lines are lost, in silence; so are all where the folder can't be made."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "rank-0.jsonl").symlink_to("/dev/full")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with writing_logs(tmp_path / name, run="r", who=0):
            for _ in range(3):
                EVENTS.error("a line")

    assert capsys.readouterr().err == ""


def test_files_are_bounded(tmp_path, monkeypatch):
    """Two files of the size given at most, the newest lines in them."""
    monkeypatch.setattr(logs, "_MOST_BYTES", 2000)
    with writing_logs(tmp_path, run="r", who=0):
        for number in range(100):
            EVENTS.info("number %d", number)
    files = sorted(tmp_path.iterdir())
    found = LogReader(tmp_path).new()

    assert [path.name for path in files] == ["rank-0.jsonl", "rank-0.jsonl.1"]
    assert all(path.stat().st_size <= 2000 for path in files)
    assert found[-1]["message"] == "number 99"
    assert 5 < len(found) < 40


def test_python_logging_is_left_as_it_was(tmp_path):
    """Handlers and level go with the run."""
    logger = logging.getLogger("lossworks")
    before = (logger.level, list(logger.handlers))
    with writing_logs(tmp_path, run="r", who=0):
        assert len(logger.handlers) == len(before[1]) + 1

    assert (logger.level, logger.handlers) == before


def test_a_training_says_what_happens(tmp_path):
    """Start, evaluations, checkpoints with seconds and bytes, a stop, and where it is gone on from."""
    with writing_logs(tmp_path / "logs", run="r", who=0):
        run_training(tiny(), None, str(tmp_path / "c"), stop_after=4)
        run_training(tiny(), None, str(tmp_path / "c"))
    found = lines(tmp_path / "logs" / "rank-0.jsonl")
    said = [(line["step"], line["message"]) for line in found]
    saved = [line for line in found if line["message"] == "checkpoint written"]

    assert said == [
        (None, "started"),
        (3, "evaluated"),
        (3, "checkpoint written"),
        (4, "stop requested"),
        (4, "checkpoint written"),
        (4, "ended"),
        (None, "started"),
        (4, "restored from a checkpoint"),
        (6, "evaluated"),
        (6, "checkpoint written"),
        (6, "ended"),
    ]
    assert found[0]["world_size"] == 1
    assert found[0]["device"] == "cpu"
    assert {"python", "torch", "lossworks"} <= found[0]["versions"].keys()
    assert all(line["seconds"] > 0 and line["bytes"] > 1000 for line in saved)
    assert found[-1]["status"] == "finished"


def test_what_is_not_finite_is_logged_with_its_ranks(tmp_path):
    """As an error, at its step."""
    values = tiny(optimizer={"lr": 1.0, "weight_decay": 1e30})
    with writing_logs(tmp_path / "logs", run="r", who=0):
        run_training(values, None, str(tmp_path / "c"))
    (error,) = (line for line in lines(tmp_path / "logs" / "rank-0.jsonl") if line["level"] == "ERROR")

    assert error["ranks"] == [0]
    assert "NaN or infinite" in error["message"]
    assert error["step"] > 1


def test_the_command_prints_in_order_of_time(folder, capsys):
    """Of all processes or one rank, from a level on, without lines that were torn."""
    with writing_logs(folder.logs, run="abc123", who="driver"):
        EVENTS.info("began")
        with writing_logs(folder.logs, run="abc123", who=1):
            EVENTS.warning("both", extra=fields(step=2, loss=1 / 3))
    with (folder.logs / "rank-1.jsonl").open("a") as file:
        file.write('torn {"\n{"time": "half')

    assert main(["logs", "abc"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert main(["logs", "talkative", "--rank", "1", "--level", "warning"]) == 0
    (one,) = capsys.readouterr().out.splitlines()

    assert len(everything) == 3
    assert everything[0].endswith("INFO    driver: began")
    assert one.endswith("WARNING rank 1: step 2: both loss=0.333333")
    assert main(["logs", "abc", "--level", "loud"]) == 2
    assert main(["logs", "abc", "--rank", "7"]) == 2
    errors = capsys.readouterr().err
    assert "loud: no such level; known: debug, info" in errors
    assert "rank-7.jsonl" in errors


def test_following_prints_what_comes_until_ctrl_c(folder):
    """A line written after the command began is printed; Ctrl-C ends it with success."""
    folder.logs.mkdir()
    command = "import sys; from lossworks.cli import main; sys.exit(main(['logs', 'abc', '--follow']))"
    process = subprocess.Popen(
        [sys.executable, "-c", command],
        env={**os.environ},
        stdout=subprocess.PIPE,
        text=True,
    )
    with writing_logs(folder.logs, run="abc123", who=0):
        EVENTS.info("first")
        first = process.stdout.readline()
        EVENTS.info("second")
        second = process.stdout.readline()
    process.send_signal(signal.SIGINT)

    assert "first" in first
    assert "second" in second
    assert process.wait(20) == 0
