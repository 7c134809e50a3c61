"""One spec trained in several ways, and how far apart the results are."""

import json
import random
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lossworks.benchmarks.equivalence.ways import CUT, Distance, Way
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import CheckpointStore, tensors_in
from lossworks.training.distributed.local_ranks import run_local_ranks
from lossworks.training.job import Job
from lossworks.training.loop import train

_ROWS = "rows.jsonl"
_FIGURES = (
    *("train/loss", "train/grad_norm", "train/bits_per_byte"),
    *("eval/loss", "eval/bits_per_byte", "eval/brier"),
)


@dataclass(frozen=True, eq=False)
class TrainedWay:
    """What a training has given.

    Attributes:
        losses: Of every step.
        held_out: The loss on held-out data after the last step.
        figures: Those two, norms of gradients and the task's own, in a fixed order.
        weights: By name, after the last step.
    """

    losses: tuple[float, ...]
    held_out: float
    figures: tuple[float, ...]
    weights: dict[str, Tensor]


def write_text(path: Path, *, words: int = 6000, seed: int = 0) -> Path:
    """Write a text with some structure to learn, the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311  (a text, no secret)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(80)]
    follows = {word: rng.sample(vocabulary, 4) for word in vocabulary}
    word, text = vocabulary[0], []
    for _ in range(words):
        word = rng.choice(follows[word])
        text.append(word)
    path.write_text(" ".join(text))
    return path


def train_ways(
    values: dict[str, Any], ways: Sequence[Way], folder: Path, imports: Sequence[str] = ()
) -> dict[str, TrainedWay]:
    """Train a spec in each way, in processes of this machine, and return the results by the ways' names.

    Args:
        values: The spec as plain data.
        ways: In which it is trained.
        folder: Empty; for checkpoints.
        imports: As :func:`run_local_ranks` takes them.
    """
    prepared = task_of(spec := parse_train_spec(values)).prepare(spec).folder
    places = [folder / str(index) for index in range(len(ways))]
    for part in range(max(len(way.stages) for way in ways)):
        # Starting processes takes longer than such a training, so all of one size share theirs.
        due = [pair for pair in zip(ways, places, strict=True) if part < len(pair[0].stages)]
        for workers in sorted({way.stages[part].workers for way, _ in due}):
            runs = [
                (
                    spec.override([f"workers={workers}", *way.stages[part].changes]).model_dump(mode="json"),
                    str(place),
                    CUT if part + 1 < len(way.stages) else None,
                )
                for way, place in due
                if way.stages[part].workers == workers
            ]
            run_local_ranks(workers, _train_all, runs, str(prepared) if prepared else None, imports=imports)
    return {way.name: _result(place) for way, place in zip(ways, places, strict=True)}


def distance(one: TrainedWay, other: TrainedWay) -> Distance:
    """Return how far ``one`` is from ``other``."""
    return Distance(
        max(abs(a - b) / abs(b) for a, b in zip(one.figures, other.figures, strict=True)),
        max(
            float((one.weights[name] - value).norm() / value.norm().clamp(min=1e-30))
            for name, value in other.weights.items()
        ),
    )


def _train_all(runs: Iterable[tuple[dict[str, Any], str, int | None]], prepared: str | None) -> None:
    """Take part in trainings, one after the other, as one rank."""
    # FSDP warns at each start of what would be wrong in code that changed the losses in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for values, folder, cut in runs:
        _train_part(values, Path(folder), Path(prepared) if prepared else None, cut)


def _train_part(values: dict[str, Any], folder: Path, prepared: Path | None, cut: int | None) -> None:
    """Go on with a training to its end, or until a step; rank 0 appends its rows."""
    spec = parse_train_spec(values)
    folder.mkdir(parents=True, exist_ok=True)
    rows = 0

    def record(_: int, metrics: dict[str, float]) -> None:
        nonlocal rows
        rows += 1
        with (folder / _ROWS).open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(metrics)}\n")

    train(
        Job(
            spec=spec,
            prepared=prepared,
            checkpoints=CheckpointStore(folder, keep=spec.checkpoint.keep),
            record=record,
            # Asked during step n, before its row is recorded.
            stop_requested=lambda: cut is not None and rows + 1 >= cut,
        )
    )


def _result(folder: Path) -> TrainedWay:
    rows = [json.loads(line) for line in (folder / _ROWS).read_text(encoding="utf-8").splitlines()]
    last = max(folder.glob("step-*"))
    return TrainedWay(
        losses=tuple(row["train/loss"] for row in rows),
        held_out=rows[-1]["eval/loss"],
        figures=tuple(row[name] for row in rows for name in _FIGURES if name in row),
        weights=tensors_in(last, "model."),
    )
