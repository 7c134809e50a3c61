"""Sends a spec to a Ray cluster's job server."""

import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossworks import __version__
from lossworks.home import QUIET_ENVIRONMENT
from lossworks_jobs.kubernetes.manifest import require_no_secrets
from lossworks_jobs.submission.bundle import SPEC_FILE, Bundle
from lossworks_jobs.submission.job_server import JobServer
from lossworks_jobs.submission.package import lock_file, write_package

_INSTALL_S = 1800

# The script becomes the process that it starts, so that signals reach it.
_SCRIPT = """\
for python in {interpreters}; do
  if "$python" -c "import sys; from importlib.util import find_spec as f; sys.exit(not (f('ray') and f('lossworks_jobs')))" 2>/dev/null
  then exec "$python" -m lossworks_jobs.submission.job_entry {arguments}
  fi
done
echo "lossworks: error: no Python of {interpreters} has Ray and Lossworks on the head; name one with --python" >&2
exit 2
"""  # noqa: E501


@dataclass(frozen=True)
class SubmitOptions:
    """How a job is sent.

    Attributes:
        package: Send this installation along; otherwise the cluster's own is used.
        install: Let Ray install the lock on every node first.
        python: The cluster's interpreter; otherwise one that has Ray is looked for there.
        home: Folder on the cluster that all nodes share; otherwise what the cluster's LOSSWORKS_HOME says.
        environment: Further variables, none of them secret: whoever sees the cluster's dashboard sees them.
        graceful_s: Seconds that a job has between being asked to stop and being killed.

    Raises:
        UserError: A variable looks like a secret.
    """

    package: bool = True
    install: bool = False
    python: str | None = None
    home: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    graceful_s: int = 120

    def __post_init__(self) -> None:
        require_no_secrets(self.environment)


def submit(server: JobServer, bundle: Bundle | None, resume: str | None, options: SubmitOptions) -> str:
    """Send a job and return its id.

    Args:
        server: Of the cluster.
        bundle: What is to run; None to go on with ``resume``.
        resume: A run of the cluster, or the id of a job that began one.
        options: How.

    Raises:
        RunError: The server refuses.
    """
    name = bundle.name if bundle else "resume"
    job = f"{_identifier(name)}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="lossworks-job-") as folder:
        content = Path(folder)
        if bundle:
            bundle.write(content)
        if options.package:
            write_package(content)
        (content / "start.sh").write_text(start_script(job, resume, options), encoding="utf-8")
        # Every process of the job finds what is in its working folder before what is installed.
        environment = runtime_environment(options) | {"working_dir": folder}
        metadata = {"lossworks": __version__, "name": name, "command": bundle.command if bundle else "resume"}
        server.submit("exec sh start.sh", environment, job, metadata)
    return job


def runtime_environment(options: SubmitOptions) -> dict[str, Any]:
    """Return what Ray prepares on every node."""
    variables = {
        **QUIET_ENVIRONMENT,
        # Read by the process that stops the job; Ray's own 3 s are too short for a checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": str(options.graceful_s),
        **({"LOSSWORKS_HOME": options.home} if options.home else {}),
        **options.environment,
    }
    environment: dict[str, Any] = {"env_vars": variables}
    if options.install:
        lines = lock_file().read_text(encoding="utf-8").splitlines()
        packages = [line for line in lines if line.strip() and not line.startswith("#")]
        environment["pip"] = {"packages": packages, "pip_check": False}
        # Gigabytes for a GPU build of torch; Ray gives up after ten minutes.
        environment["config"] = {"setup_timeout_seconds": _INSTALL_S}
    return environment


def start_script(key: str, resume: str | None, options: SubmitOptions) -> str:
    """Return the shell script that a job runs.

    ``python`` alone would be whatever the head's PATH finds, which need not be the one that Ray runs on.
    """
    arguments = ["--key", key, *(["--resume", resume] if resume else ["--spec", SPEC_FILE])]
    if options.package:
        arguments.append("--check-lock")
    known = ["python", "python3"] if options.install else [sys.executable, "python", "python3"]
    return _SCRIPT.format(
        interpreters=shlex.join([options.python] if options.python else known),
        arguments=shlex.join(arguments),
    )


def _identifier(name: str) -> str:
    """Return a name with nothing but what a job's id may hold."""
    text = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name.lower())
    return text.strip("-")[:40] or "job"
