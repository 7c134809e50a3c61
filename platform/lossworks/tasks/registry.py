"""Which tasks there are, by the entry points of the group ``lossworks.tasks``, and specs that name them."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.errors import UserError, nearest
from lossworks.specs.base import apply_overrides
from lossworks.specs.train import RunSpec

if TYPE_CHECKING:
    from lossworks.tasks.interface import Task

GROUP = "lossworks.tasks"
DEFAULT = "language-model"


@cache
def _points() -> dict[str, EntryPoint]:
    """Return the entry points by slug.

    Raises:
        UserError: Two packages offer a task of one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name in found and found[point.name].value != point.value:
            packages = ", ".join(_package(one) for one in (found[point.name], point))
            raise UserError(f"task {point.name}: is offered by two packages: {packages}; uninstall one")
        found[point.name] = point
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def task_slugs() -> list[str]:
    """Return the names of all tasks."""
    return list(_points())


def task_class(slug: str) -> "type[Task]":
    """Import and return the task of that name.

    Raises:
        UserError: There is none, or its package can't be imported.
    """
    points = _points()
    if slug not in points:
        guess = nearest(slug, points)
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError(f"task={slug!r} must be one of {', '.join(points)}{hint}")
    point = points[slug]
    try:
        found: type[Task] = point.load()
    except Exception as error:  # a package of anybody's
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"task {slug}: can't be used: {_package(point)}: {point.value}: {reason}") from error
    return found


def usable_tasks() -> "tuple[list[type[Task]], dict[str, str]]":
    """Return all tasks that can be imported, and by slug why the others can't."""
    found, refused = [], {}
    for slug in task_slugs():
        try:
            found.append(task_class(slug))
        except UserError as error:
            refused[slug] = str(error)
    return found, refused


def task_of(spec: RunSpec) -> "type[Task]":
    """Return the task of a training spec."""
    return task_class(str(getattr(spec, "task", DEFAULT)))


def parse_train_spec(values: Mapping[str, object], *, source: str = "spec") -> RunSpec:
    """Return the spec that ``values`` describe; their ``task`` says which class it is.

    Raises:
        UserError: A value is wrong.
    """
    return _spec_class(values, source).parse(values, source=source)


def read_train_spec(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Return the spec in the YAML file ``path`` with ``key.path=value`` overrides applied.

    Raises:
        UserError: The file is missing, is no YAML mapping, or holds a wrong value.
    """
    values = RunSpec.read_values(path)
    kind = _spec_class({**values, **asked_task(overrides)}, str(path))
    return kind.parse(apply_overrides(kind, values, overrides), source=str(path))


def asked_task(overrides: Sequence[str]) -> dict[str, str]:
    """Return the task that overrides name, as the value of that field; nothing if they name none."""
    # A bare word, so that it needs no YAML; whatever else stands there is refused as it was written.
    tasks = [text.partition("=")[2].strip() for text in overrides if text.startswith("task=")]
    return {"task": tasks[-1]} if tasks else {}


def _spec_class(values: Mapping[str, object], source: str) -> type[RunSpec]:
    RunSpec.require_own(values, source)
    task = values.get("task", DEFAULT)
    if not isinstance(task, str):
        raise UserError(f"{source}: task={task!r} must be one of {', '.join(task_slugs())}")
    try:
        return task_class(task).spec
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
