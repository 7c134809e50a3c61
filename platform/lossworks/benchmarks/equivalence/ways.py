"""The ways in which one spec is trained, and how far each may be from which other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CUT = 5
"""A way in two parts is cut off after so many steps, between two checkpoints."""

_COMMON: dict[str, Any] = {
    "steps": 12,
    "batch_size": 7,  # two and three workers have unequal shares
    "workers": 1,
    "sharding": {"kind": "none"},
    "optimizer": {"lr": 0.01},
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "evaluation": {"every": 12, "sequences": 50},
    "checkpoint": {"every": 3},
    "tracking": {"model": False},
}
LANGUAGE_MODEL, CLASSIFIER = "language model", "classifier"
"""The names of the two specs."""


def specs(text: Path) -> dict[str, dict[str, Any]]:
    """Return the specs that are trained, by name; the language model reads ``text``."""
    return {
        LANGUAGE_MODEL: {
            **_COMMON,
            "task": "language-model",
            "data": {"corpus": f"text:{text}", "vocab_size": 300, "sequence_length": 16},
            "model": {"layers": 2, "width": 16, "heads": 2, "tied": False},
        },
        CLASSIFIER: {
            **_COMMON,
            "task": "classification",
            "data": {"source": "wine"},
            "model": {"width": 16},
        },
    }


@dataclass(frozen=True)
class Stage:
    """A part of a training, in processes of its own; the next one goes on from its checkpoint.

    Attributes:
        workers: How many processes there are.
        changes: Of the spec, as on the command line.
    """

    workers: int
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Distance:
    """How far one training is from another, or may be.

    Attributes:
        figures: The largest relative difference of a loss or another figure of any step, or of held-out data.
        weights: The largest relative difference of a tensor of weights, by Euclidean norms.
    """

    figures: float
    weights: float


@dataclass(frozen=True)
class Way:
    """A way to train a spec.

    Attributes:
        name: What it is called on the page.
        stages: One, or two of which the first is stopped after step ``CUT``.
        like: The way that it is compared with; None for the first of all.
        bound: How far it may be from that; None where it may not, to the bit.
        quick: Whether it takes a second or two: the others compile, or start three processes.
        of: The specs that can be trained in this way.
    """

    name: str
    stages: tuple[Stage, ...]
    like: str | None = None
    bound: Distance | None = None
    quick: bool = True
    of: tuple[str, ...] = (LANGUAGE_MODEL, CLASSIFIER)


MARGIN = 5
"""What was measured stays so many times below the bounds, since other processors sum in other orders."""

ROUNDING, OTHER_PRECISION = Distance(1e-5, 1e-4), Distance(0.1, 0.5)
_ONE, _DDP, _FSDP, _SPLIT = (
    "one worker",
    "two workers, ddp",
    "two workers, fsdp",
    "two workers, fsdp, split head",
)
_LM = (LANGUAGE_MODEL,)


def _on(workers: int, *changes: str) -> Stage:
    return Stage(workers, changes)


def _ddp(workers: int, *changes: str) -> Stage:
    return Stage(workers, ("sharding=ddp", *changes))


def _fsdp(workers: int, *changes: str) -> Stage:
    return Stage(workers, ("sharding=fsdp", *changes))


def _split(workers: int, *changes: str) -> Stage:
    return _fsdp(workers, "sharding.vocab_parallel=true", *changes)


_SPARING = ("activation_checkpointing=true", "micro_batch_size=2")
WAYS = (
    Way(_ONE, (_on(1),)),
    Way("one worker, again", (_on(1),), _ONE),
    Way("one worker, stopped and resumed", (_on(1), _on(1)), _ONE),
    Way("one worker, activation checkpointing", (_on(1, _SPARING[0]),), _ONE, of=_LM),
    Way("one worker, fsdp", (_fsdp(1),), _ONE),
    Way("one worker, micro-batches of 2", (_on(1, _SPARING[1]),), _ONE, ROUNDING),
    Way("one worker, with logits", (_on(1, "loss.impl=reference"),), _ONE, ROUNDING),
    Way("one worker, compiled", (_on(1, "compile=true"),), _ONE, ROUNDING, quick=False, of=_LM),
    Way("one worker, bf16", (_on(1, "precision=bf16"),), _ONE, OTHER_PRECISION),
    Way(_DDP, (_ddp(2),), _ONE, ROUNDING),
    Way(f"{_DDP}, stopped and resumed", (_ddp(2), _ddp(2)), _DDP),
    Way(_FSDP, (_fsdp(2),), _DDP, ROUNDING),
    Way(f"{_FSDP}, stopped and resumed", (_fsdp(2), _fsdp(2)), _FSDP),
    Way(_SPLIT, (_split(2),), _FSDP, ROUNDING, of=_LM),
    Way(f"{_SPLIT}, stopped and resumed", (_split(2), _split(2)), _SPLIT, of=_LM),
    Way(f"{_SPLIT}, bf16", (_split(2, "precision=bf16"),), _ONE, OTHER_PRECISION, of=_LM),
    Way(
        f"{_SPLIT}, activation checkpointing, micro-batches of 2",
        (_split(2, *_SPARING),),
        _ONE,
        ROUNDING,
        of=_LM,
    ),
    Way("two workers, ddp, then one", (_ddp(2), _on(1)), _ONE, ROUNDING),
    Way("one worker, then two, fsdp", (_on(1), _fsdp(2)), _ONE, ROUNDING),
    Way(
        "three workers, ddp, micro-batches of 1",
        (_ddp(3, "micro_batch_size=1"),),
        _ONE,
        ROUNDING,
        quick=False,
    ),
    Way("two workers, ddp, then three, fsdp", (_ddp(2), _fsdp(3)), _ONE, ROUNDING, quick=False),
    Way("three workers, fsdp, then two, ddp", (_fsdp(3), _ddp(2)), _ONE, ROUNDING, quick=False),
    Way(
        "three workers, fsdp, split head, then one",
        (_split(3), _on(1)),
        _ONE,
        ROUNDING,
        quick=False,
        of=_LM,
    ),
)


def ways_of(spec: str, *, quick: bool = False) -> list[Way]:
    """Return the ways of the spec of that name, or the quick ones alone."""
    return [way for way in WAYS if spec in way.of and (way.quick or not quick)]
