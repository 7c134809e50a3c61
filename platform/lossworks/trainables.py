"""What a sweep can train, found through entry points, since rooms don't import each other.

A room offers what it trains as an entry point of the group ``lossworks.trainables`` that names a
:class:`Trainable`: ``training``, which trains every task of ``lossworks.tasks``, or another kind of spec.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lossworks.errors import UserError
from lossworks.specs import Spec
from lossworks.specs.base import kind_of

if TYPE_CHECKING:
    from lossworks.tasks.interface import Simplest

_GROUP = "lossworks.trainables"
_TRAINING = "training"

Direction = Literal["min", "max"]
"""Whether the smaller or the larger value of a metric is the better one."""

OWN_VALUES = ("train/loss", "eval/loss")
"""The value of the trained loss itself, in every task: it compares neither losses nor settings of one."""

StepReport = Callable[[int, dict[str, float]], None]
"""Called with a step, counted from 1, and what was measured there."""


@dataclass(frozen=True)
class Trainable:
    """One kind of training.

    Attributes:
        parse: Takes a spec's values and its source's name, and returns the spec, checked.
        seeded: Returns a spec's values with another seed.
        steps: Returns how many steps a spec's training reports up to.
        cpus: Returns how many CPUs it takes.
        yardsticks: Returns the metrics by which a spec's trainings can be compared, each with its better
            direction: ``{"eval/accuracy": "max"}``. All of them are among what ``train`` reports last.
        starts_workers: Whether these are taken by workers that it starts, and not by its own process.
        train: Trains in a folder, from where an earlier call in it stopped, and reports on the way. It is
            called in a process of a running Ray cluster.
        release: Gives back what killed trainings in folders below one hold of the cluster. It is called with
            that folder, once their processes have ended, and may be called again.
        simplest: Returns what an answer gets on a spec's held-out data that looks at no input; None if that
            is not known. It may read the data.
    """

    parse: Callable[[Mapping[str, Any], str], Spec]
    seeded: Callable[[Mapping[str, Any], int], dict[str, Any]]
    steps: Callable[[Any], int]
    cpus: Callable[[Any], float]
    yardsticks: Callable[[Any], Mapping[str, Direction]]
    train: Callable[[Any, Path, StepReport], None]
    starts_workers: bool = False
    release: Callable[[Path], None] = lambda _: None
    simplest: "Callable[[Any], Simplest | None]" = lambda _: None


def task_of(values: Mapping[str, Any]) -> str:
    """Return the name of what a spec's values train."""
    return "federation" if kind_of(values) == "federation" else str(values.get("task", "language-model"))


def trainable(task: str) -> Trainable:
    """Return what trains a task.

    Raises:
        UserError: No installed room does.
    """
    points = {point.name: point for point in entry_points(group=_GROUP)}
    point = points.get(task) or points.get(_TRAINING)
    if point is None:
        raise UserError(f"task={task}: nothing here trains it; install lossworks[jobs]")
    found: Trainable = point.load()
    return found
