"""What a run will take: memory, operations, time and disk, and what to change where that is too much."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from lossworks.errors import UserError
from lossworks.files import write_atomically
from lossworks.specs import RunSpec
from lossworks.tasks.registry import task_of
from lossworks.training.measure.micro_batch_size import sizes_of, with_rows
from lossworks.training.planning.rehearsal import Rehearsal, rehearse
from lossworks.training.planning.sizes import size_in_words
from lossworks.training.weights.start import learnt_of_start

# Fields that make a run smaller, each as overrides that only some specs can take.
_CHANGES: dict[str, tuple[str, ...]] = {
    "activations are computed again in the backward pass": ("activation_checkpointing=true",),
    "each worker keeps a part of weights, gradients and optimiser state": ("sharding=fsdp",),
    "the head is never gathered; it is no longer the embedding": (
        "sharding={kind: fsdp, vocab_parallel: true}",
        "model.tied=false",
    ),
    "products and what they keep in 16 bits": ("precision=bf16",),
    "one process instead of several that share a machine": ("workers=1", "sharding=none"),
}


@dataclass(frozen=True)
class Room:
    """The memory that there is.

    Attributes:
        size: In bytes; None where it isn't known.
        source: What it is the memory of.
        sharers: Workers that share it.
    """

    size: int | None
    source: str
    sharers: int


@dataclass(frozen=True)
class SpecChange:
    """A change of the spec, and what it would do.

    Attributes:
        overrides: As they are given to ``lossworks train``.
        effect: What it does, in words.
        needed_bytes: What the sharers of the room would need then.
        fits: Whether that is no more than there is.
    """

    overrides: tuple[str, ...]
    effect: str
    needed_bytes: int
    fits: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run will take.

    Attributes:
        name: Of the run.
        rehearsal: Memory and operations of one worker.
        base_bytes: Memory of a worker's process before it has a tensor; None where it isn't counted.
        room: The memory that there is.
        needed_bytes: What those who share the room need of it, bases included.
        fits: Whether that is no more than there is; None where that isn't known.
        changes: What would make it smaller; empty where it fits.
        unit: What throughput is counted in.
        flops_formula: How operations are counted, in words.
        steps: Of the run.
        units: Units of data in all.
        flops_per_step: Floating-point operations over all workers; None where they aren't known.
        flops: The same in all.
        seconds: At the given speed; None without one.
        checkpoints_kept: At most: the newest ones and the best.
        notes: What isn't known or isn't counted, in a sentence each.
    """

    name: str
    rehearsal: Rehearsal
    base_bytes: int | None
    room: Room
    needed_bytes: int
    fits: bool | None
    changes: tuple[SpecChange, ...]
    unit: str
    flops_formula: str
    steps: int
    units: int
    flops_per_step: float | None
    flops: float | None
    seconds: float | None
    checkpoints_kept: int
    notes: tuple[str, ...]

    def write(self, file: Path) -> None:
        """Write all of it as JSON: sizes in bytes, times in seconds."""
        values = asdict(self)
        values["rehearsal"]["peak_bytes"] = self.rehearsal.peak_bytes
        write_atomically(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def make_plan(
    spec: RunSpec, *, memory: int | None = None, speed: float | None = None, base_bytes: int | None = None
) -> RunPlan:
    """Return what a run will take; nothing is started, and no text is read.

    Args:
        spec: The run.
        memory: Bytes that there are: of the machine that all workers share, or of the GPU that each has;
            None for what this machine has free.
        speed: Tokens or examples a second, over all workers; None if it isn't known.
        base_bytes: Memory of a worker's process before it has a tensor; GPUs' memory holds none of it.

    Raises:
        UserError: The data that are read can't be used, or the model doesn't fit them.
    """
    kind, room = task_of(spec), _room(spec, memory)
    base = None if _on_gpu(spec) else base_bytes
    spec, found, further = _settled(spec, room, base)
    needed = _needed(found, room, base)
    fits = None if room.size is None else needed <= room.size
    units = found.units * spec.steps
    per_step = None if found.flops_per_unit is None else found.flops_per_unit * found.units
    return RunPlan(
        name=spec.name,
        rehearsal=found,
        base_bytes=base,
        room=room,
        needed_bytes=needed,
        fits=fits,
        changes=() if fits is not False else tuple(_changes(spec, room.size, base, needed)),
        unit=kind.unit,
        flops_formula=kind.flops_formula,
        steps=spec.steps,
        units=units,
        flops_per_step=per_step,
        flops=None if per_step is None else per_step * spec.steps,
        seconds=None if speed is None else units / speed,
        checkpoints_kept=min(spec.checkpoint.keep + 1, -(-spec.steps // spec.checkpoint.every)),
        notes=(*further, *_notes(spec, room)),
    )


def require_memory(spec: RunSpec) -> None:
    """Refuse a run on this machine whose tensors alone are more than all of its memory.

    Raises:
        UserError: Saying what they are, and what there is.
    """
    room = _whole_room(spec)
    if room.size is None:
        return
    try:
        _, found, _ = _settled(spec, room, None)
    except UserError:
        return  # whoever prepares the run says it
    needed = _needed(found, room, None)
    if needed > room.size:
        raise UserError(
            f"memory: the run's tensors take {size_in_words(found.peak_bytes)} on each of {spec.workers} "
            f"workers, and {room.source} has {size_in_words(room.size)} in all; `lossworks train SPEC "
            "--plan` says what to change, and --over-memory starts it knowingly"
        )


def _settled(spec: RunSpec, room: Room, base: int | None) -> tuple[RunSpec, Rehearsal, tuple[str, ...]]:
    """Return a run with a number of rows at once, what it takes, and a note if its spec leaves that open.

    It is the largest that fits, as far as a run that measures would try.

    Raises:
        UserError: As :func:`rehearse`.
    """
    if spec.micro_batch_size != "auto":
        return spec, rehearse(spec), ()
    share = task_of(spec).open_blank(spec, learnt_of_start(spec)).order().largest_share(spec.workers)
    for rows in reversed(sizes_of(spec, share)):
        tried = with_rows(spec, rows)
        found = rehearse(tried)
        if room.size is None or _needed(found, room, base) <= room.size:
            break
    return tried, found, (f"micro_batch_size=auto measures when the run starts; planned with {rows} at most",)


def _needed(found: Rehearsal, room: Room, base: int | None) -> int:
    return room.sharers * (found.peak_bytes + (base or 0))


def _on_gpu(spec: RunSpec) -> bool:
    return spec.resources_per_worker.get("GPU", 0) > 0


def _room(spec: RunSpec, memory: int | None) -> Room:
    """Return the memory that was given, or that is free on this machine."""
    sharers = 1 if _on_gpu(spec) else spec.workers
    if memory is not None:
        return Room(memory, "the GPU of a worker" if _on_gpu(spec) else "the machine", sharers)
    if not _on_gpu(spec):
        return Room(psutil.virtual_memory().available, "this machine", sharers)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    return Room(free, "the GPU of a worker", sharers)


def _whole_room(spec: RunSpec) -> Room:
    """Return all the memory that this machine could free for a run."""
    if _on_gpu(spec):
        size = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
        return Room(size, "the GPU of a worker", 1)
    return Room(psutil.virtual_memory().total + psutil.swap_memory().total, "this machine", spec.workers)


def _changes(spec: RunSpec, memory: int | None, base: int | None, now: int) -> list[SpecChange]:
    """Return the changes that make less of the bytes ``now``, and together those that change no model."""
    share = -(-spec.batch_size // spec.workers)
    size = min(spec.rows_at_once or share, share)
    effects = {
        f"a worker takes {rows} of its rows at once; gradients accumulate": (f"micro_batch_size={rows}",)
        for rows in (size // 2, 1)
        if 0 < rows < size
    } | _CHANGES
    tried = [_change(spec, overrides, effect, memory, base) for effect, overrides in effects.items()]
    found = [change for change in tried if change is not None and change.needed_bytes < now]
    kept = ("micro_batch_size=1", "activation_checkpointing=true", "sharding=fsdp", "precision=bf16")
    together = tuple(text for text in kept if any(change.overrides == (text,) for change in found))
    if len(together) > 1:
        whole = _change(spec, together, "these together", memory, base)
        found += [whole] if whole is not None else []
    return found


def _change(
    spec: RunSpec, overrides: Sequence[str], effect: str, memory: int | None, base: int | None
) -> SpecChange | None:
    """Return what overrides would do, or None where the spec can't take them or has them."""
    try:
        changed = spec.override(overrides)
        if changed == spec:
            return None
        found = rehearse(changed)
    except UserError:
        return None
    room = _room(changed, memory)
    needed = _needed(found, room, base)
    return SpecChange(tuple(overrides), effect, needed, room.size is not None and needed <= room.size)


def _notes(spec: RunSpec, room: Room) -> list[str]:
    """Return what isn't known or isn't counted."""
    notes = []
    if room.size is None:
        notes.append("there is no GPU here whose memory is known; give it, such as --memory 80GiB")
    if _on_gpu(spec):
        notes.append(
            "counted with the operators of a CPU; not counted: the GPU's own context, workspaces of its "
            "libraries, and what its allocator holds in reserve"
        )
    if spec.compile:
        notes.append("counted without compile, which may keep less")
    if spec.telemetry.every or spec.analyses:
        notes.append("telemetry and analyses are not counted")
    if spec.telemetry.spike.action == "rollback":
        notes.append("not counted: a copy of the first weights, which stays until the first checkpoint")
    return notes
