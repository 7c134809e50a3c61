"""Ray nodes on this machine: a head with dashboard and job server, and further raylets beside it."""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lossworks.adapters.ray_private import ray_command, read_token_again
from lossworks.errors import RunError, UserError
from lossworks.home import QUIET_ENVIRONMENT, home, home_path, ray_token_given
from lossworks.ports import require_free_port
from lossworks.signals import end_with_parent

_START_S = 90.0
_STOP_S = 15.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LocalNodes:
    """A cluster whose nodes are processes of this machine.

    Args:
        gcs: Address that drivers and further nodes join, HOST:PORT.
        jobs: Address of the job server and the dashboard, http://HOST:PORT.
        logs: Folder for the nodes' output; one file a node.
        environment: All variables of the nodes.
        ending: Ends the nodes.

    Attributes:
        processes: The head's process, then the others'.
    """

    def __init__(
        self, gcs: str, jobs: str, logs: Path, environment: Mapping[str, str], ending: ExitStack
    ) -> None:
        self.gcs, self.jobs = gcs, jobs
        self.processes: list[subprocess.Popen[bytes]] = []
        self._logs, self._environment, self._ending = logs, environment, ending
        # Each gets a folder of its own: nodes that shared one would delete one another's working folders.
        # Sockets lie in it, whose paths must be short.
        temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self._temporary = Path(ending.enter_context(temporary))

    def add(self, cpus: int, options: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a node, wait until it is up, and return its process.

        Args:
            cpus: Its logical CPUs.
            options: The options of ``ray start`` that make it the head; it joins the head without.

        Raises:
            RunError: It does not come up.
        """
        index = len(self.processes)
        log = self._logs / f"node-{index}.log"
        options = [*(options or ("--address", self.gcs)), "--temp-dir", str(self._temporary / str(index))]
        process = _start(options, cpus, log, self._environment)
        self._ending.callback(_stop, process)
        self.processes.append(process)
        _wait_for(process, log)
        return process

    @property
    def discovery(self) -> Path:
        """Return the file in which Prometheus finds the nodes' metrics (``file_sd_configs``)."""
        return self._temporary / "0" / "prom_metrics_service_discovery.json"

    def wait(self) -> None:
        """Wait until the head ends.

        Raises:
            RunError: It ended by itself.
        """
        status = self.processes[0].wait()
        raise RunError(f"the cluster's head ended with status {status}; see {self._logs}")


@contextmanager
def start_nodes(
    count: int,
    *,
    cpus: int,
    host: str = "127.0.0.1",
    port: int = 6379,
    dashboard_port: int = 8265,
    logs: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalNodes]:
    """Start a head and ``count`` − 1 further nodes, and end them all in the end.

    Ray's own protocol can't be bound to loopback, so every cluster asks for a token, whatever the host: the
    caller's own, or one that is made and kept in the home folder.

    Args:
        count: Nodes in all.
        cpus: Logical CPUs of each.
        host: Address of this machine that drivers use; the dashboard listens on it, too.
        port: Port that drivers and further nodes join; 0 for any that is free.
        dashboard_port: Port of the dashboard and the job server; 0 for any that is free.
        logs: Folder for the nodes' output; one file a node.
        environment: Variables for the nodes besides this process's own.

    Raises:
        UserError: A port is taken, or other machines may reach the host and there is no token.
        RunError: A node does not come up.
    """
    token = require_token(host)
    wanted = (("--port", port), ("--dashboard-port", dashboard_port), ("--host", 0))
    ports = [require_free_port(host, asked, named=f"{option} {host}:{asked}") for option, asked in wanted]
    variables = {**os.environ, **QUIET_ENVIRONMENT, **token, **(environment or {})}
    # Jobs look for an interpreter on PATH.
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables.get('PATH', '')}"
    head = ["--head", "--node-ip-address", host, "--port", str(ports[0]), "--include-dashboard", "true"]
    head += ["--dashboard-host", host, "--dashboard-port", str(ports[1])]
    head += ["--ray-client-server-port", str(ports[2])]
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as ending:
        nodes = LocalNodes(f"{host}:{ports[0]}", f"http://{host}:{ports[1]}", logs, variables, ending)
        for index in range(count):
            nodes.add(cpus, head if index == 0 else ())
        yield nodes


def require_token(host: str) -> dict[str, str]:
    """Return the variables that turn Ray's token authentication on for nodes.

    Raises:
        UserError: Other machines may reach ``host``, and no token was given that they could share.
    """
    if ray_token_given():
        return {"RAY_AUTH_MODE": "token"}
    if host not in LOOPBACK:
        raise UserError(
            f"--host {host}: other machines may reach it, and whoever reaches a Ray cluster runs code there: "
            "make one token for all nodes with `ray get-auth-token --generate` and copy ~/.ray/auth_token"
        )
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _own_token().read_text(encoding="ascii")}


def use_token(address: str) -> None:
    """Let this process into a cluster of this machine with the token that was made here, if none was given.

    Other machines' clusters never see that one.
    """
    host = (address.partition("://")[2] or address).rpartition(":")[0]
    if ray_token_given() or host not in LOOPBACK or not token_file().is_file():
        return
    os.environ["RAY_AUTH_TOKEN"] = token_file().read_text(encoding="ascii")
    read_token_again()


def token_file() -> Path:
    """Return the file of the token that is made here, for clusters of this machine; it may not exist."""
    return home_path() / "ray-token"


def _own_token() -> Path:
    path = token_file()
    if not path.is_file():
        home()  # makes the folder
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    return path


def _start(
    options: Sequence[str], cpus: int, log: Path, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    # Ports of workers are any, and so is the agent's: several nodes share this machine.
    command = ray_command("start", *options, "--num-cpus", str(cpus))
    command += ["--min-worker-port", "0", "--max-worker-port", "0", "--dashboard-agent-listen-port", "0"]
    command += ["--disable-usage-stats", "--block"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509  (a system call alone, no lock)
        )


def _wait_for(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while b"Ray runtime started" not in log.read_bytes():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"a node of the cluster did not come up; see {log}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a node: `ray start --block` ends what it started when asked to."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
