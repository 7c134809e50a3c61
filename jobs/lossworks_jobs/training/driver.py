"""The driver's part of a training run: workers, journal, tracking, report."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lossworks.cli import program
from lossworks.errors import LossworksError, RunError, UserError
from lossworks.logs import EVENTS, fields, writing_logs
from lossworks.lost_runs import watched
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.training.outcome import Outcome
from lossworks_jobs.clusters.ray_cluster import OwnNode, lacking
from lossworks_jobs.training.fitting import fit, last_line, read_outcome
from lossworks_jobs.training.stopping import run_until_done

if TYPE_CHECKING:
    from lossworks.reporting import TrainProgress
    from lossworks.tasks.interface import Prepared, Simplest
    from lossworks.tracking import JournalRow

_ROOM_AFTER_S = 20.0  # workers that have room start within less, mostly


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        folder: Its folder, named after its id in MLflow.
        outcome: How it ended.
        notices: Sentences that a person should see.
        simplest: What the model must be better than; None if the task knows none.
        start_up: Seconds by part from the call of ``train`` to the end of the first step; empty if there was
            none.
    """

    folder: RunFolder
    outcome: Outcome
    notices: tuple[str, ...]
    simplest: "Simplest | None"
    start_up: dict[str, float]


class Driver:
    """Starts the workers of one run, follows them, and finishes the run."""

    def __init__(
        self,
        spec: RunSpec,
        prepared: "Prepared",
        started: float,
        progress: "TrainProgress | None",
    ) -> None:
        self.spec = spec
        self.prepared = prepared
        self.progress = progress
        self.start_up: dict[str, float] = {}
        self._lap_at = started
        self.notices: list[str] = []

    def run(self, resume: RunFolder | None) -> RunResult:
        """Start the workers, follow them to their end, and finish the run in MLflow.

        Raises:
            UserError: Another process works on the run, or the workers can't do what the spec asks for.
            RunError: The run failed.
            KeyboardInterrupt: It was stopped at once.
        """
        from lossworks.reporting.finish import TRACKED_STATUS

        self._lap("data and Ray")
        folder = self._open(resume)
        with folder.hold(), watched(folder), writing_logs(folder.logs, run=folder.run_id, who="driver"):
            EVENTS.info("started", extra=fields(name=self.spec.name, resumed=resume is not None))
            status, reason = "FAILED", "the driver failed"
            try:
                self._follow(folder)
                outcome = read_outcome(folder)
                status, reason = TRACKED_STATUS[outcome.status], outcome.reason
            except KeyboardInterrupt:
                status, reason = "KILLED", "stopped at once, without a checkpoint"
                raise
            except Exception as error:
                reason = last_line(error)
                raise
            finally:
                EVENTS.info("ended", extra=fields(status=status, reason=reason))
                self._finish(folder, status, reason)
        if outcome.status in ("diverged", "storage"):
            raise RunError(f"run {folder.run_id}: {outcome.reason}")
        if outcome.status == "failed":
            raise UserError(f"run {folder.run_id}: {outcome.reason}")
        return RunResult(folder, outcome, tuple(self.notices), self.prepared.simplest, self.start_up)

    def _open(self, resume: RunFolder | None) -> RunFolder:
        """Return the folder of a new run, or of the one to go on with, entered in MLflow."""
        from lossworks.tracking import create_run, open_run

        spec = self.spec
        if resume is None:
            run_id = create_run(spec.tracking, name=spec.name, parameters=spec.flat(), tags={})
            folder = RunFolder.create(spec, run_id)
            if self.prepared.learnt is not None:
                self.prepared.learnt.write(folder.learnt)
            return folder
        open_run(spec.tracking, resume.run_id)
        return resume

    def _follow(self, folder: RunFolder) -> None:
        """Run the workers to their end while their journal goes to MLflow and to the terminal."""
        from lossworks.tracking import Follower
        from lossworks.training.checkpoints.mirror import CheckpointMirror

        spec = self.spec
        folder.store(spec)
        if (mirror := CheckpointMirror.of(spec, folder.run_id)) is not None:
            mirror.keep_run(folder)
        folder.stop_file.unlink(missing_ok=True)
        folder.outcome_file.unlink(missing_ok=True)
        waiting = _Waiting(folder, spec, self._say)
        follower = Follower(
            spec.tracking,
            folder.run_id,
            folder.journal,
            on_row=self._show,
            system_metrics=spec.tracking.system_metrics,
            on_message=self._say,
        )
        with follower:
            self._lap("MLflow")
            try:
                run_until_done(
                    lambda: fit(spec, folder, self.prepared.folder),
                    stop_file=folder.stop_file,
                    say=self._say,
                    look=waiting.look,
                )
            except Exception as error:
                if isinstance(error, LossworksError) or not folder.stop_file.exists():
                    raise
                # A signal to the whole process group has ended Ray's processes, too; the run may be saved.
                if not folder.outcome_file.exists():
                    raise RunError(
                        f"run {folder.run_id}: Ray was stopped, too, before this step was saved; "
                        f"`{program()} train --resume {folder.run_id}` goes on from the newest checkpoint"
                    ) from error
        if follower.undelivered:
            self._say(
                f"{follower.undelivered} rows wait for the tracking server: {program()} sync {folder.run_id}"
            )

    def _lap(self, part: str, until: float | None = None) -> None:
        """Put the seconds since the last lap down to a part of the start."""
        until = time.time() if until is None else until
        self.start_up[part] = until - self._lap_at
        self._lap_at = until

    def _show(self, row: "JournalRow") -> None:
        if "first step" not in self.start_up and "train/loss" in row["metrics"]:
            ended, seconds = row["time_ms"] / 1000, row["metrics"]["train/step_seconds"]
            self._lap("workers", ended - seconds)
            self._lap("first step", ended)
        if self.progress:
            self.progress.update(row)

    def _say(self, text: str) -> None:
        self.notices.append(text)
        EVENTS.info("%s", text)
        if self.progress:
            self.progress.message(text)

    def _finish(self, folder: RunFolder, status: Any, reason: str) -> None:
        """Draw the report and close the run; a server that is away must not hide how the run ended."""
        from lossworks.reporting.finish import finish_run_folder

        try:
            finish_run_folder(
                folder, self.prepared.guess, status=status, reason=reason or None, notify=self._say
            )
        except RunError as error:
            self._say(f"{error}; bring it up to date with: {program()} sync {folder.run_id}")


class _Waiting:
    """What the driver says while it waits: what workers write for a person, or that there is no room yet."""

    def __init__(self, folder: RunFolder, spec: RunSpec, say: Callable[[str], None]) -> None:
        self._folder, self._spec, self._say = folder, spec, say
        self._seen = folder.notices.stat().st_size if folder.notices.exists() else 0
        # Rank 0 makes the journal when it starts.
        self._node = OwnNode()
        self._room_checked_at = math.inf if folder.journal.exists() else time.monotonic()

    def look(self) -> None:
        """Look once; called several times a second.

        Raises:
            RunError: The node of Ray is lost, and nothing will come of waiting.
        """
        self._pass_on()
        if self._node.lost:
            raise RunError(
                f"run {self._folder.run_id}: its node of Ray is lost; "
                f"`{program()} train --resume {self._folder.run_id}` goes on from the newest checkpoint"
            )
        if time.monotonic() - self._room_checked_at > _ROOM_AFTER_S:
            self._room_checked_at = time.monotonic()
            if not self._folder.journal.exists() and (text := lacking(self._spec)):
                self._say(text)
                self._room_checked_at = math.inf

    def _pass_on(self) -> None:
        path = self._folder.notices
        if not path.exists() or path.stat().st_size == self._seen:
            return
        with path.open(encoding="utf-8") as file:
            file.seek(self._seen)
            for line in file.read().splitlines():
                self._say(line)
            self._seen = file.tell()
