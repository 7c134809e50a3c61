"""The progress of a training run on the terminal, or as plain lines in a log."""

import math
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_S = 10.0
_LINE_EVERY_PERCENT = 10
_FORMATS = {
    "train/loss": "loss {:.4f}",
    "eval/loss": "held-out {:.4f}",
    "eval/accuracy": "accuracy {:.4f}",
    "server/accuracy": "accuracy {:.4f}",
    "clients/accuracy_worst10": "worst tenth {:.4f}",
    "train/tokens_per_second": "{:,.0f} tokens/s",
    "train/examples_per_second": "{:,.0f} examples/s",
}
_BAR = (
    "train/loss",
    "server/accuracy",
    "train/tokens_per_second",
    "train/examples_per_second",
)  # more does not fit into 80 columns


class TrainProgress:
    """Shows step, loss, speed and times of a run; a context manager that may be updated from a thread.

    On a terminal it is one bar. Elsewhere it prints a plain line at the first step, at the last, and in
    between after every ten seconds or tenth of the steps, whichever comes first, but at most one a second.

    Args:
        total_steps: Steps of the whole run.
        first_step: Steps that were done before, when a run goes on.
        console: Where to; standard output if unset.
        unit: What is counted.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        console: Console | None = None,
        unit: str = "step",
    ) -> None:
        self._total, self._unit = total_steps, unit
        self._step = first_step
        self._console = console or Console()
        self._bar = _bar(self._console, unit) if self._console.is_terminal else None
        self._task = (
            None
            if self._bar is None
            else self._bar.add_task("", total=total_steps, completed=first_step, facts="")
        )
        self._values: dict[str, float] = {}
        self._began = time.monotonic()
        self._first_row: tuple[float, int] | None = None
        self._printed_at = -math.inf
        self._printed_step = first_step

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, row: Mapping[str, Any]) -> None:
        """Show one row of the journal.

        Args:
            row: ``step`` and ``metrics``, of which ``train/loss`` and ``train/tokens_per_second``
                are shown, and ``eval/loss`` in plain lines.
        """
        self._values.update(row["metrics"])
        self._step = max(self._step, int(row["step"]))
        if self._first_row is None:
            # The pace is counted from here: starting the workers is no part of it.
            self._first_row = (time.monotonic(), self._step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._step, facts=self._facts(_BAR))
        elif self._line_is_due():
            self._print_line()

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line_is_due(self) -> bool:
        since = time.monotonic() - self._printed_at
        if self._step == self._printed_step:
            return False
        tenth = self._total * _LINE_EVERY_PERCENT / 100
        far = self._step // tenth > self._printed_step // tenth
        return self._step >= self._total or since >= _LINE_EVERY_S or (far and since >= 1.0)

    def _print_line(self) -> None:
        self._printed_at, self._printed_step = time.monotonic(), self._step
        elapsed = time.monotonic() - self._began
        parts = [
            f"{self._unit} {self._step}/{self._total}",
            self._facts(_FORMATS),
            f"elapsed {_duration(elapsed)}",
        ]
        if self._first_row is not None and self._step < self._total:
            at, step = self._first_row
            if self._step > step:
                pace = (time.monotonic() - at) / (self._step - step)
                parts.append(f"left {_duration(pace * (self._total - self._step))}")
        self.message("  ".join(part for part in parts if part))

    def _facts(self, names: Iterable[str]) -> str:
        known = (name for name in names if name in self._values)
        return "  ".join(_FORMATS[name].format(self._values[name]) for name in known)


def _bar(console: Console, unit: str) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        TextColumn(unit),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
