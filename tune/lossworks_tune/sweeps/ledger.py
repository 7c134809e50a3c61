"""What a sweep keeps of its trials on disk, whichever engine trains them; everything else is made of it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lossworks.files import write_atomically
from lossworks.tracking import JournalRow, read_all

TrialStatus = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class End:
    """How a trial ended.

    Attributes:
        status: finished (all seeds), stopped (early, by scheduler or test) or failed.
        reason: Why, in words.
        step: Steps taken, over all its seeds.
    """

    status: TrialStatus
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
    def has_begun(self) -> bool:
        """Whether what it trains is stored whole; after a power cut it may not be, and it begins again."""
        return _read(self.configuration_file) is not None

    @property
    def configuration(self) -> Configuration:
        """What is trained, of a trial that has begun."""
        return Configuration(**json.loads(self.configuration_file.read_text(encoding="utf-8")))

    @property
    def end(self) -> End | None:
        """How it ended, None if it has not."""
        values = _read(self.end_file)
        return None if values is None else End(**values)

    def rows(self) -> list[JournalRow]:
        """Return what was reported; steps go on from seed to seed."""
        return read_all(self.journal)


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
    status: TrialStatus
    reason: str
    rows: list[JournalRow]
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


class TrialsFolder:
    """The trials below a folder; those whose files have not changed are not read again.

    Args:
        path: The folder; it need not exist.
        steps: How many steps each training reports up to.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self._steps = path, steps
        self._known: dict[str, tuple[tuple[_Stamp, ...], Trial]] = {}

    def of(self, number: int) -> TrialFolder:
        """Return the folder of a trial."""
        return TrialFolder(self.path / f"{number:05d}")

    def begun(self) -> list[TrialFolder]:
        """Return the folders of all trials that have begun, by number."""
        return [folder for folder in self.folders() if folder.has_begun]

    def read(self) -> tuple[Trial, ...]:
        """Return all trials by number; one that has not changed is the same object as before."""
        found = (self._read(folder) for folder in self.folders())
        return tuple(trial for trial in found if trial is not None)

    def folders(self) -> list[TrialFolder]:
        """Return the folders of all trials, by number, whether what they train is stored whole or not."""
        return [TrialFolder(folder) for folder in sorted(self.path.glob("[0-9]*"))]

    def _read(self, folder: TrialFolder) -> Trial | None:
        # Taken before the files are read: what is written meanwhile is seen the next time.
        stamps = tuple(map(_stamp, (folder.configuration_file, folder.journal, folder.end_file)))
        known = self._known.get(folder.path.name)
        if known is not None and known[0] == stamps:
            return known[1]
        if not folder.has_begun:
            return None
        trial = Trial.read(folder, self._steps)
        self._known[folder.path.name] = stamps, trial
        return trial


_Stamp = tuple[int, int, int] | None


def _stamp(file: Path) -> _Stamp:
    """Return what tells one content of a file from the next: inode, size and time of its last change."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def shown(value: Any) -> str:
    """Return a value as titles have it."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _write(file: Path, values: Mapping[str, Any]) -> None:
    # Not synced, for trials of milliseconds: what a power cut takes is trained again.
    write_atomically(file, json.dumps(values), synced=False)


def _read(file: Path) -> dict[str, Any] | None:
    """Return what a file holds, or None if there is none or it was never written to its end."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found
