"""Runs whose driver was killed: MLflow is told, and so is a person, with the command that goes on.

Nothing in a process can speak once it is killed, or once a library ends it, as Ray's does where its node has
gone. So each driver has a small process beside it that waits for its end (:func:`watched`). After a power cut
the next command that has to do with runs sees to what is left (:func:`settle_lost_runs`).
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lossworks.cli import program
from lossworks.errors import LossworksError, redact, shortened
from lossworks.home import runs_folder
from lossworks.runs import RunFolder
from lossworks.specs import TrackingSpec, read_yaml
from lossworks.specs.base import KINDS, kind_of

_REASON = "its driver was killed, or ended by Ray whose node was lost"
# It imports nothing of ours until there is something to do: reading returns once the driver has gone.
_WATCH = """\
import sys
if not sys.stdin.buffer.read():
    from lossworks.lost_runs import main
    main(*sys.argv[1:])
"""


@contextmanager
def watched(folder: RunFolder) -> Iterator[None]:
    """Have a process of its own see to a run should this one be killed; runs lost before are seen to first.

    It outlives signals to this process's group and its terminal.
    """
    settle_lost_runs()
    command = [sys.executable, "-c", _WATCH, str(folder.path), program()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            yield
        finally:
            watcher.communicate(b"ended")


def settle_lost_runs() -> list[str]:
    """Set the status of all runs in the home folder that were lost; return a sentence about each."""
    folders = [RunFolder(lock.parent) for lock in sorted(runs_folder().glob("*/lock"))]
    return [text for folder in folders if folder.was_lost() and (text := _settle(folder, program()))]


def main(path: str, command: str) -> None:
    """Say what became of a run whose driver has gone, and set its status.

    Args:
        path: Its folder.
        command: How this user calls ``lossworks``.
    """
    text = _settle(RunFolder(Path(path)), command)
    if text:
        print(f"lossworks: {text}", file=sys.stderr, flush=True)


def _settle(folder: RunFolder, command: str) -> str:
    """Return what to say of a lost run, or nothing if another process has taken it up meanwhile."""
    try:
        with folder.hold(briefly=True):
            values = read_yaml(folder.spec_file)
            kind = KINDS[kind_of(values) or "training"].command
            way = (
                f"sync {folder.run_id}"
                if folder.outcome_file.exists()
                else f"{kind} --resume {folder.run_id}"
            )
            said = f"run {folder.run_id}: {_REASON}"
            try:
                _close(folder.run_id, values)
            except Exception as error:  # noqa: BLE001  (whatever the store says, the way on holds)
                said += f"; MLflow could not be told: {shortened(redact(str(error)))}"
            return f"{said}; go on with: {command} {way}"
    except (LossworksError, OSError):
        return ""


def _close(run_id: str, values: Mapping[str, Any]) -> None:
    """Set the status of a run and of those below it that are still said to run."""
    from lossworks.tracking import finish_run
    from lossworks.tracking.client import connect

    own = values.get("tracking") or {}
    tracking = TrackingSpec.parse({name: own[name] for name in TrackingSpec.model_fields if name in own})
    client = connect(tracking)
    run = client.get_run(run_id)
    below = client.search_runs(
        [run.info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{run_id}' and attributes.status = 'RUNNING'",
        max_results=50_000,
    )
    for one in [*below, run]:
        if one.info.status == "RUNNING":
            finish_run(tracking, one.info.run_id, "KILLED", reason=_REASON)
