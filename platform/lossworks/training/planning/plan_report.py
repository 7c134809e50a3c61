"""What a run will take, as the command line prints it."""

import shlex
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from lossworks.reporting.summary import print_summary
from lossworks.training.planning.plan import RunPlan
from lossworks.training.planning.sizes import size_in_words

_WIDTH_OF_FILES = 140


def print_plan(plan: RunPlan) -> None:
    """Print a worker's memory by parts, what the run takes in all, and what to change if it doesn't fit."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    moment = plan.rehearsal.moment
    console.print(f"memory of one worker at its peak, in the {moment}", highlight=False)
    console.print(_memory(plan), highlight=False)
    console.print()
    print_summary(f"plan of {plan.name}", _facts(plan), console=console)
    if plan.changes:
        console.print()
        console.print("what would make it smaller", highlight=False)
        console.print(_changes(plan), highlight=False)
    for note in plan.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _memory(plan: RunPlan) -> Table:
    found = plan.rehearsal
    table = Table(box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("size", justify="right", no_wrap=True)
    for part, size in found.peak.items():
        table.add_row(part, size_in_words(size))
    table.add_row("all tensors", size_in_words(found.peak_bytes), style="bold", end_section=True)
    if plan.base_bytes is not None:
        table.add_row("the process itself, apart from them", size_in_words(plan.base_bytes))
    return table


def _facts(plan: RunPlan) -> list[tuple[str, str]]:
    found, room = plan.rehearsal, plan.room
    there = "not known" if room.size is None else size_in_words(room.size)
    answer = {True: "it fits", False: "IT DOES NOT FIT", None: "whether it fits is not known"}[plan.fits]
    sharers = f" for {room.sharers} workers" if room.sharers > 1 else ""
    facts = [
        ("parameters", f"{found.parameters:,}"),
        ("memory", f"{size_in_words(plan.needed_bytes)}{sharers} of {there} ({room.source}): {answer}"),
        (plan.unit, f"{found.units:,} a step, {plan.units:,} in all"),
    ]
    if plan.flops_per_step is None or plan.flops is None:
        facts.append(("operations", "not known for this model"))
    else:
        counted = f"{plan.flops_per_step:.3g} FLOPs a step, {plan.flops:.3g} in all"
        facts.append(("operations", f"{counted}: {plan.flops_formula}"))
    facts.append(("time", _time(plan)))
    size, kept = found.checkpoint_bytes, plan.checkpoints_kept
    disk = f"{size_in_words(size)} each, at most {kept} kept: {size_in_words(size * kept)}"
    return [*facts, ("checkpoints on disk", disk)]


def _time(plan: RunPlan) -> str:
    if plan.seconds is None:
        return f"not known, give --{plan.unit}-per-second"
    return f"{timedelta(seconds=round(plan.seconds))} at the given speed, without evaluations and checkpoints"


def _changes(plan: RunPlan) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("change", overflow="fold")
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for change in plan.changes:
        size = size_in_words(change.needed_bytes)
        table.add_row(shlex.join(change.overrides), size, "yes" if change.fits else "no", change.effect)
    return table
