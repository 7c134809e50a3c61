"""A real `lossworks server` in a process of its own, which tests can kill and start again."""

import configparser
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from lossworks.ports import require_free_port

PROGRAM = [sys.executable, "-c", "import sys; from lossworks.cli import main; sys.exit(main())"]


def free_port() -> int:
    """Return a port that nobody listens on."""
    return require_free_port("127.0.0.1", 0, named="127.0.0.1")


class TeamServer:
    """`lossworks server` with a home folder of its own.

    Args:
        home: The home folder.
        options: More options of the command.
        variables: More environment variables.
    """

    def __init__(self, home: Path, *options: str, **variables: str) -> None:
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.home, self.log = home, home / "server.log"
        self._options = options
        self._variables = {"LOSSWORKS_HOME": str(home), **variables}
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start it, or start it again, and wait until it answers."""
        self.home.mkdir(exist_ok=True)
        command = [*PROGRAM, "server", "--port", str(self.port), *self._options]
        environment = {**os.environ, **self._variables}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.home, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 90
        while not self._answers():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.kill()
                raise AssertionError(f"no server: {self.log.read_text()[-3000:]}")
            time.sleep(0.1)

    def administrator(self) -> dict[str, str]:
        """Return the variables with which MLflow's client is the administrator."""
        parser = configparser.RawConfigParser()
        parser.read(self.home / "server" / "admin-credentials")
        return {name.upper(): value for name, value in parser["mlflow"].items()}

    def signal(self, number: int) -> int:
        """Send a signal to the command alone and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def kill(self) -> None:
        """Kill it and all its processes, as when a machine loses power."""
        if self.process is None:
            return
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), self.process]
        except psutil.NoSuchProcess:
            family = []
        for process in family:
            process.kill()
        self.process.wait()
        psutil.wait_procs(family[:-1], timeout=10)
        self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2):  # noqa: S310
                return True
        except OSError:
            return False
