"""A migrated store per test, and one real MLflow server for all."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lossworks.specs import TrackingSpec
from lossworks.tracking.client import connect


class Server:
    """A real ``mlflow server`` that can be killed and started again on the same port and store."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            # A session of its own, so that its worker process can be killed with it.
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._wait()

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _wait(self) -> None:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):  # noqa: S310
                    return
            except OSError:
                time.sleep(0.1)
        self.kill()
        pytest.fail(f"no server after 60 s: {(self.folder / 'server.log').read_text()[-2000:]}")


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A migrated database: making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    connect(TrackingSpec(uri=f"sqlite:///{path}"))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


@pytest.fixture
def spec(home, template):
    """The spec of the embedded store, already migrated."""
    shutil.copy(template, home / "mlflow.db")
    return TrackingSpec(system_metrics=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory, template):
    """One server for the session; a test that kills it starts it again."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(template, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server_spec(home, server):
    return TrackingSpec(uri=server.uri, system_metrics=False)


@pytest.fixture
def history():
    """Return a function that reads one metric's points (step, value) from a store."""

    def read(spec, run_id, name):
        return [(point.step, point.value) for point in connect(spec).get_metric_history(run_id, name)]

    return read
