"""What a submitted job runs on the cluster: ``python -m lossworks_jobs.submission.job_entry``.

It brings the uploaded files to storage that all nodes share, and calls the command that the spec is for. A
job that is started again under its key goes on with the run that it began, whoever starts it: a person, or
KubeRay after the head was lost.
"""

import argparse
import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lossworks.cli import main as run_command
from lossworks.errors import LossworksError, UserError
from lossworks.home import home
from lossworks.runs import JOB_VARIABLE, RunFolder, note_run, run_of
from lossworks.specs.base import command_of, read_yaml
from lossworks_jobs.submission.bundle import FILES, UPLOADED

RUN_LINE = "lossworks: run "


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a job and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lossworks_jobs.submission.job_entry", description=__doc__
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--spec", type=Path, help="YAML file; files that it names as upload:// lie beside it")
    what.add_argument("--resume", metavar="RUN", help="go on with a run of this cluster, or with a job's")
    parser.add_argument(
        "--key", required=True, help="name under which the job is known when it is started again"
    )
    parser.add_argument("--check-lock", action="store_true", help="refuse other packages than the lock's")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.check_lock:
            from lossworks_jobs.submission.lock import require_locked_versions

            require_locked_versions()
        job = home() / "jobs" / parsed.key
        job.mkdir(parents=True, exist_ok=True)
        command = _command(job, parsed.spec, parsed.resume)
    except LossworksError as error:
        print(f"lossworks: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    os.environ[JOB_VARIABLE] = str(job)
    os.chdir(job)  # Ray may remove its own folder of the job while it still runs
    threading.Thread(target=_announce, args=(job,), daemon=True).start()
    return run_command(command)


def _command(job: Path, spec: Path | None, resume: str | None) -> list[str]:
    """Return the command line of a new run, or of the one that goes on."""
    folder = run_of(job)
    if resume is not None:
        folder = run_of(home() / "jobs" / resume) or RunFolder.find(resume)
        note_run(job, folder)
    if folder is not None:
        print(f"going on with run {folder.run_id}", flush=True)
        return [command_of(read_yaml(folder.spec_file)), "--resume", str(folder.path)]
    if spec is None:
        raise UserError("--spec is missing")
    values = _brought(read_yaml(spec), spec.parent / FILES)
    stored = job / "spec.yaml"
    stored.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return [command_of(values), str(stored)]


def _brought(values: Any, files: Path) -> Any:
    """Return values with uploaded paths replaced by those in the home folder; files are copied there."""
    if isinstance(values, dict):
        return {name: _brought(value, files) for name, value in values.items()}
    if not isinstance(values, str) or UPLOADED not in values:
        return values
    prefix, _, place = values.partition(UPLOADED)
    folder, _, _ = place.partition("/")
    target = home() / "uploads" / folder  # named by its content: what is there is the same
    if not target.is_dir():
        partial = target.with_name(f".{folder}.{os.getpid()}")
        shutil.copytree(files / folder, partial)
        partial.replace(target)
    return f"{prefix}{home() / 'uploads' / place}"


def _announce(job: Path) -> None:
    """Say which run is the job's, once it has begun."""
    from lossworks.specs import TrackingSpec
    from lossworks.tracking import redact, tracking_uri

    while (folder := run_of(job)) is None:
        time.sleep(0.2)
    tracking = TrackingSpec.parse({"uri": (read_yaml(folder.spec_file).get("tracking") or {}).get("uri")})
    print(
        f"{RUN_LINE}{folder.run_id} in MLflow at {redact(tracking_uri(tracking))}, files in {folder.path}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
