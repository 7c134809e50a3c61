"""A Ray cluster's job server, with errors that a person can act on."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lossworks.adapters.ray_private import TALKATIVE_LOGGERS
from lossworks.errors import RunError, UserError
from lossworks.home import prepare_process
from lossworks.ports import host_and_port, silence
from lossworks_jobs.clusters.local_nodes import use_token

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class JobEnd:
    """How a job ended.

    Attributes:
        status: SUCCEEDED, FAILED or STOPPED.
        exit_status: That of its process; 1 if it had none, 130 if it was stopped.
        message: What the server says about it.
    """

    status: str
    exit_status: int
    message: str


class JobServer:
    """A connection to the job server of a Ray cluster.

    Args:
        address: ``http(s)://HOST:PORT``, that of the cluster's dashboard.

    Raises:
        UserError: Nothing answers there, or it refuses our token.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        _require_answer(self.address)
        prepare_process()
        use_token(self.address)
        # Our folders hold what is to be sent, and data may come with a .gitignore of their own.
        os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
        from ray.job_submission import JobSubmissionClient

        for name in TALKATIVE_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._errors():
            self._client = JobSubmissionClient(self.address)

    def submit(
        self, entrypoint: str, runtime_env: dict[str, Any], job: str, metadata: dict[str, str]
    ) -> None:
        """Upload what ``runtime_env`` names and start a job."""
        with self._errors():
            self._client.submit_job(
                entrypoint=entrypoint, runtime_env=runtime_env, submission_id=job, metadata=metadata
            )

    def jobs(self) -> "list[JobDetails]":
        """Return all jobs that were submitted, the newest first."""
        with self._errors():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def find(self, name: str) -> "JobDetails":
        """Return the job with an id, or a unique beginning of one.

        Raises:
            UserError: There is none, or there are several.
        """
        known = self.jobs()
        found = [job for job in known if (job.submission_id or "").startswith(name)]
        exact = [job for job in found if job.submission_id == name]
        if len(exact or found) == 1:
            return (exact or found)[0]
        ids = ", ".join(str(job.submission_id) for job in (found or known)[:5]) or "none"
        what = "begins the ids of several jobs" if found else "no such job; there are"
        raise UserError(f"job {name}: {what}: {ids}")

    def logs(self, job: str) -> str:
        """Return all that a job has printed."""
        with self._errors():
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> None:
        """Ask a job to end; it has the time that it was submitted with."""
        with self._errors():
            self._client.stop_job(job)

    def end(self, job: str) -> JobEnd | None:
        """Return how a job ended, or None while it goes on."""
        with self._errors():
            info = self._client.get_job_info(job)
        status = info.status.value
        if status not in ENDED:
            return None
        code = {"SUCCEEDED": 0, "STOPPED": 130}.get(status, info.driver_exit_code or 1)
        code = 128 - code if code < 0 else code  # ended by a signal, as shells say it
        return JobEnd(status, code, info.message or "")

    def follow(self, job: str, write: Callable[[str], None]) -> JobEnd:
        """Pass on what a job prints until it has ended, through interruptions of the connection.

        Raises:
            RunError: The server has been away for a minute.
        """
        seen, lost_at = 0, None
        while True:
            try:
                seen = asyncio.run(self._tail(job, seen, write))
                end = self.end(job)
                if end is not None:
                    # The stream may end before its last lines.
                    write(self.logs(job)[seen:])
                    return end
                lost_at = None
            except (_Interrupted, RunError) as error:
                seen = error.seen if isinstance(error, _Interrupted) else seen
                lost_at = lost_at or time.monotonic()
                if time.monotonic() - lost_at > _PATIENCE_S:
                    raise RunError(
                        f"job {job}: the cluster at {self.address} has been away for {_PATIENCE_S:g} s; if "
                        f"its head is lost, start again with --resume {job} once it is back"
                    ) from None
            time.sleep(1.0)

    async def _tail(self, job: str, seen: int, write: Callable[[str], None]) -> int:
        """Pass on a job's output behind the first ``seen`` characters; return how many there were."""
        passed = 0
        try:
            async for text in self._client.tail_job_logs(job):
                write(text[max(0, seen - passed) :])
                passed += len(text)
        except Exception as error:
            raise _Interrupted(max(seen, passed)) from error
        return max(seen, passed)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of Ray's client into ours."""
        from ray.exceptions import AuthenticationError
        from requests import RequestException

        try:
            yield
        except AuthenticationError:
            raise UserError(
                f"--address {self.address}: the cluster refuses our token: set RAY_AUTH_TOKEN_PATH to a "
                "file with the token that it was started with, or put it into ~/.ray/auth_token"
            ) from None
        except (RequestException, ConnectionError) as error:
            raise RunError(f"the job server at {self.address} does not answer: {_line(error)}") from None
        except (RuntimeError, ValueError) as error:
            raise RunError(f"the job server at {self.address} refuses: {_line(error)}") from None


class _Interrupted(Exception):  # noqa: N818  (an event, caught nearby)
    """The stream of a job's output broke off behind ``seen`` characters."""

    def __init__(self, seen: int) -> None:
        super().__init__(seen)
        self.seen = seen


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def _require_answer(address: str) -> None:
    """Refuse an address that is no web server's, which Ray might import as a module, or does not answer."""
    server = host_and_port(address)
    if server is None or not address.startswith(("http://", "https://")):
        raise UserError(
            f"--address {address}: use http(s)://HOST:PORT, the address of the cluster's dashboard"
        )
    if reason := silence(*server):
        raise UserError(f"--address {address}: no job server answers there: {reason}")
