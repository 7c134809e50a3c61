"""The trainings of a study: packed in this process where they can be, else each by its task, on Ray."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lossworks.errors import LossworksError, RunError
from lossworks.tracking import usable_cpus
from lossworks.trainables import trainable
from lossworks_tune.cluster import WAITING_CPUS, cluster, room
from lossworks_tune.studies.plan import StudyPlan, Training
from lossworks_tune.studies.store import Result

Keep = Callable[[Training, Result], None]
Lacking = Callable[[Training], str]


def split(plan: StudyPlan, trainings: Sequence[Training]) -> tuple[list[Training], list[Training]]:
    """Return the trainings that can be packed, and the others; those that come first leave runs."""
    from lossworks_tune.packs import reason_against

    variants = [one for one in trainings if one.variant in plan.variants]
    packed = [one for one in variants if reason_against(plan.task, one.spec) is None]
    taken = {one.key for one in packed}
    return packed, [one for one in trainings if one.key not in taken]


def check(plan: StudyPlan, *, local: bool) -> None:
    """Refuse what can't be trained, before anything is entered anywhere.

    Args:
        plan: The trainings.
        local: Whether what is not packed trains on this machine.

    Raises:
        UserError: Data can't be read, a model doesn't fit them, or a training has no room.
    """
    from lossworks.training.packed import PackedRun

    packed, others = split(plan, [*plan.firsts, *plan.trainings])
    for training in packed:
        if training.seed == plan.seeds[0]:
            PackedRun.start(training.spec)
    if others and local:
        room(None, _cpus(plan, others), usable_cpus())


def train(
    plan: StudyPlan,
    waiting: Sequence[Training],
    folder: Path,
    address: str | None,
    keep: Keep,
    lacking: Lacking,
) -> None:
    """Train what has not ended.

    Args:
        plan: The study's trainings.
        waiting: Those of them to train, any that others need before these.
        folder: Where those that are not packed have folders of their own; on storage that all nodes share.
        address: A Ray cluster to join; without it the one that runs here, or a new one.
        keep: Called with each training that has ended.
        lacking: Returns why a training can't begin after those before it, or nothing.

    Raises:
        UserError: There is no room for a training.
        RunError: Ray lost a training more often than it was tried again.
    """
    packed, others = split(plan, waiting)
    for _, group in groupby(packed, key=lambda training: training.setting):
        for training, result in _packed(list(group)):
            keep(training, result)
    if others:
        _by_ray(plan, others, folder, address, keep, lacking)


def _packed(trainings: Sequence[Training]) -> Iterator[tuple[Training, Result]]:
    from lossworks.training.packed import PackedRun
    from lossworks_tune.packs import trained

    runs = {id(run := PackedRun.start(one.spec)): (one, run) for one in trainings}
    for run, report in trained([run for _, run in runs.values()]):
        yield runs[id(run)][0], Result(report.metrics, report.failure or "")


def _cpus(plan: StudyPlan, trainings: Sequence[Training]) -> float:
    return max(plan.trainable.cpus(training.spec) for training in trainings)


def _by_ray(
    plan: StudyPlan,
    trainings: Sequence[Training],
    folder: Path,
    address: str | None,
    keep: Keep,
    lacking: Lacking,
) -> None:
    """Train each in a process of its own, as many at once as have room; first those that come first."""
    with cluster(address) as free:
        for _, group in groupby(trainings, key=lambda one: one.variant not in plan.variants and one.variant):
            ready = []
            for one in group:
                if why := lacking(one):
                    keep(one, Result({}, why))
                else:
                    ready.append(one)
            if ready:
                _at_once(plan, ready, folder, free, keep)


def _at_once(plan: StudyPlan, trainings: Sequence[Training], folder: Path, free: float, keep: Keep) -> None:
    """Train each in a process of its own, as many at once as free CPUs have room for."""
    import ray

    cpus = _cpus(plan, trainings)
    at_once = room(None, cpus, free)
    own = WAITING_CPUS if plan.trainable.starts_workers else cpus
    start = ray.remote(_train_one).options(num_cpus=own, max_retries=2)
    left, working = list(trainings), dict[Any, Training]()
    while left or working:
        while left and len(working) < at_once:
            one = left.pop(0)
            values = plan.placed(one, lambda first: str(folder / first.digest))
            working[start.remote(plan.task, values, str(folder / one.digest))] = one
        (done,), _ = ray.wait(list(working))
        training = working.pop(done)
        try:
            metrics, failure = ray.get(done)
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{training.variant}, seed {training.seed}: {lines[-1]}") from error
        keep(training, Result(metrics, failure))


def _train_one(task: str, values: Mapping[str, Any], folder: str) -> tuple[dict[str, float], str]:
    """Train in a folder, or go on there; return what was measured last and why it failed, if it did."""
    kind = trainable(task)
    spec: Any = kind.parse(values, "study")
    last: dict[int, dict[str, float]] = {}
    try:
        # What methods find at the end comes with the last step again.
        kind.train(spec, Path(folder), lambda step, row: last.setdefault(step, {}).update(row))
    except LossworksError as error:
        return {}, str(error)
    steps = kind.steps(spec)
    if steps not in last:
        return {}, f"step {steps}, its last, was not reported"
    return last[steps], ""
