"""What a sweep keeps of its trials on disk, whichever engine trains them; everything else is made of it."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lossworks.tracking import Row, read_all

Status = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class End:
    """How a trial ended.

    Attributes:
        status: finished (all seeds), stopped (early, by scheduler or test) or failed.
        reason: Why, in words.
        step: Steps taken, over all its seeds.
    """

    status: Status
    reason: str
    step: int


@dataclass(frozen=True)
class Configuration:
    """What a trial trains.

    Attributes:
        number: From 0, in the order in which they were begun.
        fields: Dotted fields of the base's spec.
        parameters: The searcher's; empty for anchors.
        anchor: What it is in words, of those that every sweep contains; else empty.
    """

    number: int
    fields: dict[str, Any]
    parameters: dict[str, Any] = field(default_factory=dict)
    anchor: str = ""

    @property
    def loss(self) -> str:
        """Slug of its loss."""
        return str(self.fields["loss.name"])

    @property
    def title(self) -> str:
        """The loss, and what else is set, in words."""
        if self.anchor:
            others = {n: v for n, v in self.fields.items() if not n.startswith("loss.")}
            return ", ".join([self.anchor, *(f"{n}={shown(v)}" for n, v in others.items())])
        own = {n.removeprefix("loss."): v for n, v in self.fields.items() if n != "loss.name"}
        return " ".join([self.loss, *(f"{name}={shown(value)}" for name, value in own.items())])


class TrialFolder:
    """One trial's folder.

    Args:
        path: The folder; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.configuration_file = path / "configuration.json"
        self.journal = path / "metrics.jsonl"
        self.end_file = path / "end.json"
        self.run_id_file = path / "run-id"

    def begin(self, configuration: Configuration) -> None:
        """Make the folder, and store what is trained."""
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.configuration_file, asdict(configuration))

    def finish(self, end: End) -> None:
        """Store how the trial ended."""
        _write(self.end_file, asdict(end))

    @property
    def configuration(self) -> Configuration:
        """What is trained."""
        return Configuration(**json.loads(self.configuration_file.read_text(encoding="utf-8")))

    @property
    def end(self) -> End | None:
        """How it ended, None if it has not."""
        if not self.end_file.is_file():
            return None
        return End(**json.loads(self.end_file.read_text(encoding="utf-8")))

    def rows(self) -> list[Row]:
        """Return what was reported; steps go on from seed to seed."""
        return read_all(self.journal)


def folders(path: Path) -> Iterator[TrialFolder]:
    """Yield the trials below a folder, by number."""
    for folder in sorted(path.glob("[0-9]*")):
        if (folder / "configuration.json").is_file():
            yield TrialFolder(folder)


def folder_of(path: Path, number: int) -> TrialFolder:
    """Return the folder of a trial."""
    return TrialFolder(path / f"{number:05d}")


@dataclass(frozen=True, eq=False)
class Trial:
    """A trial as results see it.

    Attributes:
        configuration: What is trained.
        status: How it stands.
        reason: Why it ended so.
        rows: What was reported.
        finals: Last metrics of every seed that came to its end, in the order of the seeds.
    """

    configuration: Configuration
    status: Status
    reason: str
    rows: list[Row]
    finals: list[dict[str, float]]

    @classmethod
    def read(cls, folder: TrialFolder, steps: int) -> "Trial":
        """Return a trial whose trainings report up to ``steps`` each."""
        rows, end = folder.rows(), folder.end
        finals = [row["metrics"] for row in rows if row["step"] % steps == 0]
        status, reason = (end.status, end.reason) if end else ("running", "")
        return cls(folder.configuration, status, reason, rows, finals)

    def seeds_values(self, metric: str) -> list[float]:
        """Return the last value of a metric of every seed that came to its end."""
        return [final[metric] for final in self.finals if metric in final]

    def value(self, metric: str) -> float:
        """Return the mean over those seeds; NaN if there is none."""
        values = self.seeds_values(metric)
        return sum(values) / len(values) if values else math.nan

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Return steps and values of a metric."""
        points = [(row["step"], row["metrics"][metric]) for row in self.rows if metric in row["metrics"]]
        return [step for step, _ in points], [value for _, value in points]


def shown(value: Any) -> str:
    """Return a value as titles have it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values), encoding="utf-8")
    partial.replace(file)
