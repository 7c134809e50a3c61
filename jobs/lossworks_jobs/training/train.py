"""``train(spec)``: a sharded run on Ray, tracked in MLflow."""

import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from lossworks.errors import UserError
from lossworks.ports import require_answer
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.specs.files import located, require_files
from lossworks.tasks.registry import task_of
from lossworks.training.outcome import Outcome
from lossworks_jobs.clusters.ray_cluster import cluster, require_local_resources
from lossworks_jobs.training.driver import Driver, RunResult

if TYPE_CHECKING:
    from lossworks.data.learnt import Learnt
    from lossworks.reporting import TrainProgress
    from lossworks.tasks.interface import Prepared

# What decides the shape of the parameters, the batches that a checkpoint's position counts, the objective, or
# what a checkpoint keeps of the optimiser.
_FIXED_ON_RESUME = (
    *("task", "model.", "data.", "seed", "batch_size", "start", "roles", "methods", "loss"),
    "optimizer.kind",
)
_FREE_ON_RESUME = ("loss.impl",)


def train(
    spec: RunSpec,
    *,
    address: str | None = None,
    resume: RunFolder | None = None,
    changed_data: bool = False,
    over_memory: bool = False,
    progress: "TrainProgress | None" = None,
) -> RunResult:
    """Train as ``spec`` says and return how it ended; MLflow has the run's right status whatever happens.

    Args:
        spec: The run.
        address: A Ray cluster to join; without it that of ``$RAY_ADDRESS``, or a new one here.
        resume: Go on with this run from its newest whole checkpoint.
        changed_data: Go on although the run's data are others now; its classes, scales and tokenizer stay.
        over_memory: Start although the tensors alone are more than all memory of this machine.
        progress: Shown while the run goes on.

    Raises:
        UserError: Something in the spec can't work; no worker was started.
        RunError: The run failed.
        KeyboardInterrupt: It was stopped at once, by a second Ctrl-C.
    """
    from lossworks.tracking import check_tracking
    from lossworks.training.checkpoints.mirror import CheckpointMirror
    from lossworks.training.weights.start import settled

    started = time.time()
    if resume is not None:
        _require_resumable(located(spec), resume)
    spec = located(settled(spec))
    require_files(spec)
    local = address is None and "RAY_ADDRESS" not in os.environ
    if local:
        require_local_resources(spec)
    else:
        require_answer(address)
    check_tracking(spec.tracking)
    RunFolder.check_storage(spec)
    CheckpointMirror.check(spec)
    _import_what_threads_share()
    with ThreadPoolExecutor(3) as pool:
        prepared = pool.submit(_prepare, spec, resume, changed_data, progress)
        # What is read at once is read before Ray starts, so that a mistake in it is all there is to see. Text
        # is another matter: bad or cached text shows within moments; otherwise Ray starts meanwhile.
        wait([prepared], timeout=2.0 if task_of(spec).prepares_long else None)
        if prepared.done():
            prepared.result()
        # Both take seconds of one CPU, in which Ray's processes start on the others.
        opened = pool.submit(_open_store, spec)
        roomy = pool.submit(_require_memory, spec) if local and not over_memory else None
        if progress:
            progress.message(f"starting {spec.workers} worker{'s' * (spec.workers > 1)} on Ray")
        with cluster(spec, address):
            found = prepared.result()
            opened.result()
            if roomy is not None:
                roomy.result()
            return Driver(spec, found, started, progress).run(resume)


def _import_what_threads_share() -> None:
    """Import torch's distributed checkpoints before several threads do.

    Their modules import each other in a circle, and of two threads one may then find a module half made.
    """
    importlib.import_module("lossworks.training.weights.start")


def _require_memory(spec: RunSpec) -> None:
    from lossworks.training.planning.plan import require_memory

    require_memory(spec)


def _prepare(
    spec: RunSpec, resume: RunFolder | None, changed_data: bool, progress: "TrainProgress | None"
) -> "Prepared":
    """Read the data and check that everything that the spec names fits together.

    Classes, scales and tokenizer are those of the run that goes on, or that the new one begins from.
    """
    from lossworks.training.weights.start import check_companions, learnt_by, learnt_of_start

    kind = task_of(spec)
    learnt = learnt_of_start(spec) if resume is None else learnt_by(resume)
    found = kind.prepare(spec, progress.message if progress else None, learnt)
    if resume is not None and learnt is not None and found.learnt is not None:
        _require_same_data(learnt, found.learnt, changed_data)
    if spec.start is not None or spec.roles:
        check_companions(spec, kind.open(spec, found.folder, learnt))
    return found


def _require_same_data(kept: "Learnt", found: "Learnt", changed_data: bool) -> None:
    """Refuse to go on with other data, unless somebody knows.

    Raises:
        UserError: Saying so.
    """
    if kept.digest != found.digest and not changed_data:
        raise UserError(
            f"data: are not what they were when {kept.source} began (digest {found.digest[:12]}, not "
            f"{kept.digest[:12]}); bring them back, or go on knowingly with --changed-data, or begin a new "
            "run from its weights: start=RUN"
        )


def _open_store(spec: RunSpec) -> None:
    """Import MLflow and open the tracking store, which takes seconds the first time."""
    from lossworks.tracking.client import connect

    connect(spec.tracking)


def _require_resumable(spec: RunSpec, folder: RunFolder) -> None:
    """Refuse to go on with a run whose parameters or batches would be others.

    Raises:
        UserError: Naming the field and both values, or that the run is complete.
    """
    stored, asked = located(folder.spec()).flat(), spec.flat()
    for name in (*asked, *(name for name in stored if name not in asked)):
        value = asked.get(name)
        fixed = name.startswith(_FIXED_ON_RESUME) and name not in _FREE_ON_RESUME
        if fixed and stored.get(name) != value:
            raise UserError(
                f"{name}={value}: the checkpoints of run {folder.run_id} were made with {stored.get(name)}; "
                f"leave it, or begin a new run from its weights: start={folder.run_id}"
            )
    momentum = "optimizer.momentum"
    if asked["optimizer.kind"] == "sgd" and asked[momentum] and not stored[momentum]:
        raise UserError(
            f"{momentum}={asked[momentum]}: the checkpoints of run {folder.run_id} were made with 0, and "
            f"keep no sum of gradients; leave it, or begin a new run from its weights: start={folder.run_id}"
        )
    outcome = Outcome.stored(folder.outcome_file)
    if outcome is not None and outcome.status == "finished" and outcome.step >= spec.steps:
        raise UserError(
            f"run {folder.run_id}: has finished its {outcome.step} steps; give a larger steps= to go on"
        )
