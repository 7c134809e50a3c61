"""The results of a study's trainings on disk, one JSON line each, written when a training has ended."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossworks.errors import RunError
from lossworks_tune.studies.plan import Training

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Result:
    """How a training ended.

    Attributes:
        metrics: What it measured last; empty if it failed.
        failure: Why it failed; empty if it did not.
    """

    metrics: Mapping[str, float]
    failure: str = ""


class ResultStore:
    """Results in a file; a process that is killed while it writes loses at most the line that it writes.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, training: Training, result: Result) -> None:
        """Append the result of a training.

        Raises:
            RunError: The file can't be written, for instance because the disk is full.
        """
        variant, setting, seed = training.key
        line = {
            "variant": variant,
            "setting": setting,
            "seed": seed,
            "digest": training.digest,
            "metrics": encoded(result.metrics),
            "failure": result.failure,
        }
        try:
            self._append(json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        except OSError as error:
            raise RunError(f"{self.path}: can't be written: {error.strerror}") from None

    def of(self, trainings: Iterable[Training]) -> dict[Key, Result]:
        """Return the results of those trainings that have ended, with the very spec that they have now."""
        found = {
            (line["variant"], line["setting"], line["seed"], line["digest"]): line for line in self._lines()
        }
        results = {}
        for training in trainings:
            line = found.get((*training.key, training.digest))
            if line is not None:
                results[training.key] = Result(decoded(line["metrics"]), line["failure"])
        return results

    def _append(self, line: bytes) -> None:
        # One write is whole or, where the process or the disk ends, a torn line, which readers pass over.
        with self.path.open("ab", buffering=0) as file:
            if self._is_torn():
                line = b"\n" + line
            written = file.write(line)
        if written != len(line):
            raise RunError(f"{self.path}: can't be written: the disk is full")

    def _is_torn(self) -> bool:
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return False
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def _lines(self) -> Iterable[dict[str, Any]]:
        if not self.path.is_file():
            return
        for line in self.path.read_bytes().splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue  # torn
            if isinstance(values, dict):
                yield values


def encoded(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return metrics as JSON can hold them: NaN and the infinities, which it has not, as words."""
    return {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}


def decoded(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what :func:`encoded` was given."""
    return {name: float(value) for name, value in metrics.items()}
