"""The journal of a run: one JSON line per row of metrics, written by one process and read by others."""

import json
import logging
import math
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict

from lossworks.errors import RunError, UserError

_logger = logging.getLogger(__name__)

# What MLflow takes on every system, at most 250 characters.
_NAME = re.compile(r"[A-Za-z0-9_.\-/ ]{1,250}")


_LOOK_S = 0.2


class JournalRow(TypedDict):
    """One row of a journal.

    Attributes:
        step: The step that the metrics belong to.
        time_ms: When the row was written, in milliseconds since 1970.
        metrics: Values by name; NaN and the infinities are allowed.
    """

    step: int
    time_ms: int
    metrics: dict[str, float]


class Journal:
    """Appends rows of metrics to a file; open one with ``Journal.open``.

    Each metric's steps only grow: a value for a step that is not after the metric's last one is left out.
    A worker that was restarted from a checkpoint repeats steps, and so gives each curve every step once.

    Args:
        path: File of the journal.
        descriptor: File descriptor that appends to it.
        size: Bytes that it holds, all of them complete lines.
        last: Last journaled step of each metric.
    """

    def __init__(self, path: Path, descriptor: int, size: int, last: dict[str, int]) -> None:
        self.path = path
        self._descriptor = descriptor
        self._size = size
        self._last = last

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a journal for appending, creating it and dropping a torn last line.

        Raises:
            RunError: The file can't be opened or written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunError(f"{path}: the journal can't be opened: {error.strerror}") from None
        # A process that was killed in the middle of a write leaves half a line. Readers take complete lines
        # only, so nobody has seen it.
        rows, size = read_rows(path)
        if os.fstat(descriptor).st_size > size:
            os.ftruncate(descriptor, size)
        return cls(path, descriptor, size, _last_steps(rows))

    def write(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Append one row and return whether any of its metrics was new at this step.

        The line goes to the operating system in one unbuffered write, so it survives the death of this
        process. It is not forced to the disk: that would take milliseconds a step.

        Args:
            step: The step that the metrics belong to, not negative.
            metrics: Values by name; NaN and the infinities are allowed.

        Raises:
            UserError: A name holds characters that MLflow refuses, or the step is negative.
            RunError: The file can't be written, for instance because the disk is full.
        """
        if step < 0:
            raise UserError(f"step={step} of a journal row must not be negative")
        fresh = {name: float(value) for name, value in metrics.items() if self._is_new(name, step)}
        if not fresh:
            return False
        self._append(_encode(step, time.time_ns() // 1_000_000, fresh))
        self._last.update(dict.fromkeys(fresh, step))
        return True

    def close(self) -> None:
        """Close the file; further writes are an error, a second close is none."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _is_new(self, name: str, step: int) -> bool:
        last = self._last.get(name)
        if last is None:
            _check_name(name)
        return last is None or step > last

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise RunError(f"{self.path}: the journal can't be written: {error.strerror}") from None
        if written != len(line):
            # A full disk takes part of a line; the next row must not be glued to it.
            os.ftruncate(self._descriptor, self._size)
            raise RunError(f"{self.path}: the journal can't be written: the disk is full")
        self._size += written


def read_rows(path: str | Path, offset: int = 0, *, limit: int | None = None) -> tuple[list[JournalRow], int]:
    """Return the complete rows from a byte offset on, and the offset behind the last of them.

    A last line without its newline is still being written and is left for the next call. A file that does
    not exist yet has no rows. A complete line that is no row (a damaged disk) is skipped with a warning.

    Args:
        path: File of the journal.
        offset: Byte offset of a line's start, such as an earlier call returned.
        limit: Most lines to read; all if unset.
    """
    rows: list[JournalRow] = []
    try:
        with Path(path).open("rb") as file:
            file.seek(offset)
            for count, line in enumerate(file):
                if count == limit or not line.endswith(b"\n"):
                    break
                row = _decode(line)
                if row is None:
                    _logger.warning("%s: the line at byte %d is no row and was skipped", path, offset)
                else:
                    rows.append(row)
                offset += len(line)
    except FileNotFoundError:
        pass
    return rows, offset


def rows_while(path: str | Path, work: Callable[[], object]) -> Iterator[JournalRow]:
    """Do some work in a thread and yield all rows of a journal meanwhile, those that were there before too.

    Raises:
        BaseException: What the work raises, behind its last row.
    """
    with ThreadPoolExecutor(1) as pool:
        working, offset = pool.submit(work), 0
        ended = False
        while not ended:
            ended = bool(wait([working], timeout=_LOOK_S).done)
            rows, offset = read_rows(path, offset)
            yield from rows
        working.result()


def read_all(path: str | Path) -> list[JournalRow]:
    """Return every complete row of a journal; none if the file does not exist."""
    return read_rows(path)[0]


def last_step(path: str | Path, prefix: str = "train/") -> int | None:
    """Return the step of the last row that holds a metric whose name starts with ``prefix``.

    Returns:
        The step, or None when there is no such row or no journal.
    """
    steps = (row["step"] for row in reversed(read_all(path)) if _has_prefix(row["metrics"], prefix))
    return next(steps, None)


def _has_prefix(names: Iterable[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _last_steps(rows: Iterable[JournalRow]) -> dict[str, int]:
    last: dict[str, int] = {}
    for row in rows:
        for name in row["metrics"]:
            last[name] = max(row["step"], last.get(name, -1))
    return last


def _check_name(name: str) -> None:
    # MLflow may turn names into paths, and refuses those that a path would not keep as they are.
    keeps = _NAME.fullmatch(name) and posixpath.normpath(name) == name and name not in (".", "..")
    if not keeps or name.startswith(("/", "../")):
        raise UserError(
            f"metric name {name!r}: use letters, digits, _ . - space and single slashes inside, "
            "at most 250 characters"
        )


def _encode(step: int, time_ms: int, metrics: Mapping[str, float]) -> bytes:
    # JSON has no NaN and no infinity: as strings they survive every reader.
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    row = {"step": step, "time_ms": time_ms, "metrics": values}
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _decode(line: bytes) -> JournalRow | None:
    try:
        row: Any = json.loads(line)
        metrics = {str(name): float(value) for name, value in row["metrics"].items()}
        return JournalRow(step=int(row["step"]), time_ms=int(row["time_ms"]), metrics=metrics)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
