"""Where the time of a run goes: wall-clock seconds by phase, which sum to all of it.

Time belongs to the innermost phase that is under way, so that the head, which is called inside the model's
forward pass, is no part of ``forward``. Evaluation and checkpoints are whole, with what they communicate.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol

import torch

PHASES = (
    "data",
    "forward",
    "head",
    "backward",
    "communication",
    "optimizer",
    "evaluation",
    "checkpoint",
    "other",
)
_WHOLE = frozenset({"evaluation", "checkpoint"})


class Ticks(Protocol):
    """Takes the time between marks."""

    def mark(self, phase: str | None) -> None:
        """Say that the time since the last mark belongs to ``phase``; None for no phase's."""

    def settle(self, seconds: dict[str, float], *, wait: bool) -> None:
        """Add what has become known to ``seconds``; ``wait`` for the rest of it."""


class HostTicks:
    """The clock of the process, for devices that compute while the process waits."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def mark(self, phase: str | None) -> None:
        """Take the time since the last mark."""
        now = time.perf_counter()
        if phase is not None:
            self._seconds[phase] += now - self._last
        self._last = now

    def settle(self, seconds: dict[str, float], *, wait: bool) -> None:
        """Hand over all time taken."""
        del wait
        for phase, value in self._seconds.items():
            seconds[phase] += value
            self._seconds[phase] = 0.0


class DeviceTicks:
    """Events in a GPU's stream: the process runs ahead of the GPU, and so its own clock says nothing.

    An event's time is read once the GPU has passed it, which the step's own synchronisation brings about;
    nothing is waited for in between.

    Args:
        make_event: Returns an event of ``torch.cuda``, with timing.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        self._make = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._passed: list[Any] = []  # events to use again
        self._last: Any = None
        self._open: deque[tuple[Any, str | None]] = deque()

    def mark(self, phase: str | None) -> None:
        """Record an event that ends what ``phase`` has done since the last."""
        event = self._passed.pop() if self._passed else self._make()
        event.record()
        self._open.append((event, phase))

    def settle(self, seconds: dict[str, float], *, wait: bool) -> None:
        """Read the events that the GPU has passed, in order."""
        if wait and self._open:
            self._open[-1][0].synchronize()
        while self._open and self._open[0][0].query():
            event, phase = self._open.popleft()
            if self._last is not None:
                if phase is not None:
                    seconds[phase] += self._last.elapsed_time(event) / 1000
                self._passed.append(self._last)
            self._last = event


class PhaseClock:
    """Charges the time of a run to its phases: ``with clock("forward"): ...``.

    Args:
        ticks: How time is taken; nothing is counted before :meth:`start`.
    """

    def __init__(self, ticks: Ticks) -> None:
        self._ticks = ticks
        self._stack = ["other"]
        self._ranges: list[Any] | None = None
        self._spans = {name: _Span(self, name) for name in PHASES}
        self._seconds, self._lap = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)

    @classmethod
    def on(cls, device: torch.device) -> "PhaseClock":
        """Return a clock for what computes on ``device``."""
        return cls(DeviceTicks() if device.type == "cuda" else HostTicks())

    def start(self) -> None:
        """Count from here."""
        self._ticks.mark(None)

    def __call__(self, phase: str) -> "_Span":
        """Return a context manager inside which time belongs to ``phase``."""
        return self._spans[phase]

    def within(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are a phase."""

        def timed(*arguments: Any) -> Any:
            with self._spans[phase]:
                return function(*arguments)

        return timed

    def turn(self, phase: str) -> None:
        """Let the rest of the phase under way belong to another."""
        self._ticks.mark(self._stack[-1])
        if self._stack[-1] not in _WHOLE:
            self._stack[-1] = phase

    def skip(self) -> None:
        """Count nothing since the last change of phase, which was no part of the run."""
        self._ticks.mark(None)

    def name_ranges(self, *, enabled: bool) -> None:
        """Show the phases that begin from now on to torch's profiler, or no longer."""
        self._ranges = [] if enabled else None

    def settle(self) -> None:
        """Read what is known without waiting; call it once a step."""
        self._ticks.settle(self._seconds, wait=False)

    def total(self) -> dict[str, float]:
        """Return the seconds of every phase since the start."""
        self._ticks.mark(self._stack[-1])
        self._ticks.settle(self._seconds, wait=True)
        return dict(self._seconds)

    def lap(self) -> dict[str, float]:
        """Return the seconds of every phase since the last lap, or since the start."""
        total = self.total()
        since = {phase: total[phase] - self._lap[phase] for phase in PHASES}
        self._lap = total
        return since

    def _enter(self, phase: str) -> None:
        outer = self._stack[-1]
        self._ticks.mark(outer)
        self._stack.append(outer if outer in _WHOLE else phase)
        if self._ranges is not None:
            self._ranges.append(torch.profiler.record_function(phase).__enter__())

    def _leave(self) -> None:
        self._ticks.mark(self._stack.pop())
        if self._ranges:
            self._ranges.pop().__exit__(None, None, None)


class _Span:
    """A phase as a context manager; one object serves all its times, which a step has many of."""

    __slots__ = ("_clock", "_phase")

    def __init__(self, clock: PhaseClock, phase: str) -> None:
        self._clock, self._phase = clock, phase

    def __enter__(self) -> None:
        self._clock._enter(self._phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock._leave()


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each phase's share of the time; they sum to 1, or are all 0 where there was none."""
    total = sum(seconds.values())
    return {phase: value / total if total else 0.0 for phase, value in seconds.items()}
