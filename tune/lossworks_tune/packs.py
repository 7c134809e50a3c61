"""Packed trainings put together and advanced, as many at once as fit a processor's caches."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lossworks.errors import UserError
from lossworks.training.packed import PackedReport, PackedRun, advance, obstacle

_FLOATS_AT_ONCE = 2**22  # entries of the parameters of runs trained at once, so that a step stays in caches

Item = TypeVar("Item")


def reason_against(task: str, spec: Any) -> str | None:
    """Return why a training can't be packed with others, or None."""
    if task == "federation":
        return "federations train clients at once already"
    return obstacle(spec)


def groups(items: Iterable[Item], run_of: Callable[[Item], PackedRun]) -> Iterator[list[Item]]:
    """Yield items that can be advanced together: alike, and as far from their next report.

    Args:
        items: What is trained.
        run_of: Returns an item's training.
    """
    found: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        run = run_of(item)
        found[run.common, run.until_report].append(item)
    for group in found.values():
        size = sum(value.numel() for value in run_of(group[0]).tensors["params"].values())
        many = max(1, _FLOATS_AT_ONCE // size)
        yield from (group[start : start + many] for start in range(0, len(group), many))


def advanced(
    runs: Sequence[PackedRun], on_step: Callable[[int], None] = lambda _: None
) -> list[tuple[PackedRun, PackedReport]]:
    """Train runs of one group to their next report, and return it with each run.

    Where they fail together, for instance for want of memory, each is tried alone, to find which one fails.

    Args:
        runs: Of one group.
        on_step: Called after each step with how many have been taken.
    """
    steps = runs[0].until_report
    try:
        return list(zip(runs, advance(runs, steps, on_step), strict=True))
    except (RuntimeError, MemoryError, UserError) as error:
        if len(runs) == 1:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return [(runs[0], PackedReport(runs[0].step, {}, lines[-1]))]
        return [pair for run in runs for pair in advanced([run])]


def trained(runs: Iterable[PackedRun]) -> Iterator[tuple[PackedRun, PackedReport]]:
    """Train runs to their ends, group by group, and yield each with its last report when it has ended."""
    for group in list(groups(runs, lambda run: run)):
        going = list(group)
        while going:
            reports = advanced(going)
            ended = [(run, report) for run, report in reports if _is_over(run, report)]
            yield from ended
            over = {id(run) for run, _ in ended}
            going = [run for run in going if id(run) not in over]


def _is_over(run: PackedRun, report: PackedReport) -> bool:
    return report.failure is not None or run.step >= run.spec.steps
