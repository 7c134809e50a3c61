"""The workers of a run in Ray Train: started, replaced when they are lost, and what they leave."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.errors import RunError
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.training.outcome import Outcome
from lossworks_jobs.clusters.ray_cluster import OwnNode, threads

if TYPE_CHECKING:
    from ray.train import UserCallback


def fit(spec: RunSpec, folder: RunFolder, prepared: Path | None) -> None:
    """Run the workers to their end, replacing those that are lost.

    Args:
        spec: The run.
        folder: Where they go on from, and leave their journal and outcome.
        prepared: Folder that the task made for all workers; None if it made none.

    Raises:
        RunError: More were lost than ``max_failures``, or the training function failed.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    from lossworks_jobs.ray_train_private import TrainerOnOwnNode
    from lossworks_jobs.training.worker import run_ray_worker

    config = {
        "spec": spec.model_dump(mode="json"),
        "folder": str(folder.path),
        "prepared": str(prepared) if prepared else None,
        "threads": threads(spec),
    }
    least = spec.elastic.min_workers
    trainer = (TrainerOnOwnNode if OwnNode().there else TorchTrainer)(
        run_ray_worker,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=spec.workers if least is None else (least, spec.workers),
            elastic_resize_monitor_interval_s=spec.elastic.resize_every_s,
            use_gpu=spec.resources_per_worker.get("GPU", 0) > 0,
            resources_per_worker=spec.resources_per_worker,
        ),
        run_config=RunConfig(
            # A name that storage knows would make Ray resume by itself; resuming is the loop's business.
            name=f"attempt-{time.time_ns()}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=spec.max_failures),
            callbacks=[noticed(folder, spec)],
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads(spec))}},
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"run {folder.run_id}: {_cause(error)}") from error


def release(folder: RunFolder) -> None:
    """Give back the CPUs of workers whose driver was killed, as Ray Tune does to trials that it stops.

    Ray Train has a process for that, which asks the dashboard whether the driver lives, and where there is
    none it waits for ever.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if folder.placement_file.exists():
        number = bytes.fromhex(folder.placement_file.read_text(encoding="ascii"))
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(number)))


def noticed(folder: RunFolder, spec: RunSpec) -> "UserCallback":
    """Return a callback that tells the person at the driver of lost workers and of storage that isn't shared.

    It runs in Ray's controller, on the driver's node.
    """
    from ray.train import UserCallback

    from lossworks_jobs.training.worker import UNSHARED

    least = spec.elastic.min_workers
    when = f"all {spec.workers} workers have" if least is None else f"at least {least} of them have"

    class Noticed(UserCallback):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            del run_context, checkpoint
            Outcome("storage", metrics[0][UNSHARED], 0, {}, None, None).write(folder.outcome_file)

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            del run_context
            ranks = ", ".join(map(str, sorted(worker_exceptions)))
            cause = last_line(worker_exceptions[min(worker_exceptions)])
            folder.notify(f"lost rank {ranks} ({cause[:200]}); starting again once {when} room")

    return Noticed()


def read_outcome(folder: RunFolder) -> Outcome:
    """Return what the workers left.

    Raises:
        RunError: They left nothing.
    """
    found = Outcome.stored(folder.outcome_file)
    if found is None:
        raise RunError(
            f"run {folder.run_id}: the workers ended without an outcome; see {folder.path / 'ray'}"
        )
    return found


def last_line(error: BaseException) -> str:
    """Return the last line of what an error says that names an error, or the last at all.

    Where in C++ it came from, which may stand behind or within, is left out.
    """
    text = re.sub(r"\[\S+\.(cc|cpp|cu|h):\d+\] ", "", str(error).partition("\nAt:\n")[0])
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1]


def _cause(error: BaseException) -> str:
    """Return one line: the last line of what the lowest failed rank raised, or of the error itself."""
    failures = getattr(error, "worker_failures", None) or {}
    if failures:
        rank = min(failures)
        return f"rank {rank} failed: {last_line(failures[rank])}"
    return last_line(error)
