"""An MLflow server as a child process: started, waited for, and ended in good order."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from lossworks.errors import RunError
from lossworks.home import QUIET_ENVIRONMENT
from lossworks.ports import require_free_port
from lossworks.signals import end_with_parent, stop_signals_interrupt


def backend_environment(uri: str) -> dict[str, str]:
    """Return the variables that tell a server where its runs are.

    Every user of the machine can see a command's arguments, but not its environment, so an address with a
    password goes there.
    """
    return {"MLFLOW_BACKEND_STORE_URI": uri}


def serve(arguments: Sequence[str], *, host: str, port: int, environment: Mapping[str, str]) -> None:
    """Run ``mlflow server``, with an application of ours, until Ctrl-C or SIGTERM.

    Args:
        arguments: Of ``mlflow server``, besides host and port; ``--app-name`` is one of ours.
        host: Address to listen on.
        port: Port to listen on; 0 for any that is free.
        environment: More variables.

    Raises:
        UserError: The address can't be listened on.
        RunError: The server ended by itself.
    """
    port = require_free_port(host, port, named=f"--host {host} --port {port}")
    print(f"MLflow at http://{_shown(host)}:{port} (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "lossworks.tracking.server.application"]
    command += ["--host", host, "--port", str(port), *arguments]
    # Its background jobs are of no use to someone who looks at runs, and cost five more processes.
    quiet = {**QUIET_ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # In a session of its own Ctrl-C reaches only us: the server would answer it with tracebacks.
    server = subprocess.Popen(
        command,
        env={**os.environ, **quiet, **environment},
        start_new_session=True,
        preexec_fn=end_with_parent,  # noqa: PLW1509  (a system call alone, no lock)
    )
    try:
        with stop_signals_interrupt():
            status = server.wait()
    except KeyboardInterrupt:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return
    raise RunError(f"the MLflow server ended with status {status}; what it said stands above")


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
