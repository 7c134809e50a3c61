"""Real Ray nodes on this machine, for tests: started, looked at, and lost."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from lossworks.runs import RunFolder, run_of
from lossworks.tracking import read_all
from lossworks_jobs.clusters.local_nodes import LocalNodes


def lose(process: subprocess.Popen) -> None:
    """End a node as a power cut does: all its processes at once, without a word."""
    node = psutil.Process(process.pid)
    for member in [node, *node.children(recursive=True)]:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


@contextmanager
def blind_node(nodes: LocalNodes, home: Path, temporary: Path, log: Path) -> Iterator[subprocess.Popen]:
    """A node of one CPU that joins ``nodes`` and finds an empty folder where the shared home folder is.

    Args:
        nodes: The cluster, with a token of its own making.
        home: The home folder, which holds that token.
        temporary: Ray's folder on this node; sockets lie in it, so its path must be short.
        log: File for the node's output.
    """
    token = (home / "ray-token").read_text(encoding="ascii")
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(home)]
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", nodes.gcs, "--num-cpus", "1"]
    start += ["--temp-dir", str(temporary), "--dashboard-agent-listen-port", "0", "--block"]
    with log.open("wb") as file:
        node = subprocess.Popen(
            [*hide, *start],
            env={
                **os.environ,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": token,
                "LOSSWORKS_HOME": str(home),
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: "Ray runtime started" in log.read_text(), "a node", seconds=60)
        yield node
    finally:
        lose(node)


def command(*arguments: str, home: Path, log: Path) -> subprocess.Popen:
    """Start a command of the command line in a process of its own, with its output in a file."""
    code = "import sys; from lossworks.cli import main; sys.exit(main())"
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "LOSSWORKS_HOME": str(home)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def cli(*arguments: str, home: Path) -> tuple[int, str]:
    """Run a command of the command line in a process of its own; return its exit status and output.

    Within the tests' process it would share Ray's token with them.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        return command(*arguments, home=home, log=log).wait(120), log.read_text()


def until(found: Callable[[], object], what: str, *, seconds: float = 200.0):
    """Wait until something is found and return it."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)
    return result


def job_of(log: Path) -> str:
    """Return the id that ``lossworks submit`` has printed."""
    return until(
        lambda: [line.split()[1] for line in log.read_text().splitlines() if line.startswith("job ")], "a job"
    )[0]


def run_at(home: Path, job: str, step: int) -> RunFolder:
    """Wait until a job's run has journaled a step, and return its folder."""

    def reached() -> RunFolder | None:
        folder = run_of(home / "jobs" / job)
        return folder if folder is not None and any(at >= step for at, _ in curve(folder)) else None

    return until(reached, f"step {step} of {job}")


def curve(folder: RunFolder) -> list[tuple[int, float]]:
    """Return the training losses of a run by step."""
    rows = read_all(folder.journal)
    return [(row["step"], row["metrics"]["train/loss"]) for row in rows if "train/loss" in row["metrics"]]


def notices(folder: RunFolder) -> str:
    """Return what workers have written for a person so far."""
    return folder.notices.read_text() if folder.notices.is_file() else ""


def listening(pid: int, name: str) -> list[int]:
    """Return the ports on which the descendants of a process that are called ``name`` listen."""
    members = [member for member in psutil.Process(pid).children(recursive=True) if member.name() == name]
    return [
        connection.laddr.port
        for member in members
        for connection in member.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]


def processes_of(nodes: LocalNodes, name: str) -> list[psutil.Process]:
    """Return the processes below any node whose command line has a word."""
    running = [node.pid for node in nodes.processes if node.poll() is None]
    return [found for pid in running for found in descendants_of(pid, name)]


def descendants_of(pid: int, name: str) -> list[psutil.Process]:
    """Return the descendants of a process whose command line has a word."""
    found = []
    for member in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # has ended since
            found += [member] if name in json.dumps(member.cmdline()) else []
    return found
