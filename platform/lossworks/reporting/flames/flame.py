"""A profile's trace as a tree of calls, whose boxes a flame graph draws."""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossworks.reporting.phase_colours import PHASE_COLOURS

_RANGES = "user_annotation"
_HOST = {_RANGES, "python_function", "cpu_op"}
_ENGINE = "autograd::engine"
# What stands between a caller and what it calls, and says nothing.
_PLUMBING = re.compile(r"_call_impl$|contextlib\.py|_contextlib\.py|^<built-in|^autograd::engine::")


@dataclass
class TracedCall:
    """What was called from one place, all its calls together.

    Attributes:
        name: Of a function, an operator or a phase.
        phase: That it belongs to.
        total: Microseconds, with what it called.
        count: How often.
        children: What it called, by name.
    """

    name: str
    phase: str
    total: float = 0.0
    count: int = 0
    children: dict[str, "TracedCall"] = field(default_factory=dict)

    def child(self, name: str) -> "TracedCall":
        """Return what is called so from here, made at its first call."""
        if name not in self.children:
            self.children[name] = TracedCall(name, name if name in PHASE_COLOURS else self.phase)
        return self.children[name]


@dataclass(frozen=True)
class Box:
    """A rectangle of the flame graph.

    Attributes:
        name: Of the call.
        phase: Its colour.
        depth: From 0, the root.
        left: Its left end, of a width of 1.
        width: Share of the whole time.
        milliseconds: Of all its calls.
        count: How many these were.
    """

    name: str
    phase: str
    depth: int
    left: float
    width: float
    milliseconds: float
    count: int


def read_calls(path: Path) -> TracedCall:
    """Return the tree of calls in a Chrome trace of torch's profiler, gzipped.

    Its root is what lies inside the ranges called ``step N``. Calls of autograd's own threads are put where
    the step waits for them. What a GPU does meanwhile is in the trace and not in the tree.

    Raises:
        ValueError: The file is no such trace.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return build_calls([event for event in events if event.get("ph") == "X" and event.get("cat") in _HOST])


def build_calls(events: Sequence[dict[str, Any]]) -> TracedCall:
    """Return the tree of the events of a trace.

    Args:
        events: Each with ``cat``, ``name``, ``tid``, and ``ts`` and ``dur`` in microseconds.
    """
    steps = [event for event in events if event["cat"] == _RANGES and event["name"].startswith("step ")]
    root = TracedCall(f"{len(steps)} steps", "other")
    threads = {event["tid"] for event in events if event["name"].startswith(_ENGINE)}
    threads |= {event["tid"] for event in steps}
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in steps]
    inside = [event for event in events if event["tid"] in threads and _within(event, spans)]
    _Builder(root).take(sorted(inside, key=lambda event: (event["ts"], -event["dur"])))
    root.total = sum(child.total for child in root.children.values())
    root.count = len(steps)
    return root


def _within(event: dict[str, Any], spans: Sequence[tuple[float, float]]) -> bool:
    return any(begin <= event["ts"] < end for begin, end in spans)


@dataclass
class _Open:
    """A call that has not ended yet."""

    call: TracedCall
    begin: float
    end: float
    is_range: bool


class _Builder:
    """Nests events by time.

    A named range begins and ends inside the functions that name it, and so crosses them: they are cut off.
    """

    def __init__(self, root: TracedCall) -> None:
        self._stack = [_Open(root, 0.0, float("inf"), is_range=True)]

    def take(self, events: Sequence[dict[str, Any]]) -> None:
        """Nest events, which are in order of time, longer ones first."""
        for event in events:
            self._close(event["ts"])
            self._open(event)
        self._close(float("inf"))

    def _open(self, event: dict[str, Any]) -> None:
        begin, end, is_range = event["ts"], event["ts"] + event["dur"], event["cat"] == _RANGES
        while is_range and self._stack[-1].end < end and not self._stack[-1].is_range:
            self._pop(begin)
        top = self._stack[-1]
        plumbing = _PLUMBING.search(event["name"])
        call = top.call if plumbing else top.call.child(short_name(event["name"]))
        self._stack.append(_Open(call, begin, min(end, top.end), is_range))

    def _close(self, now: float) -> None:
        while len(self._stack) > 1 and self._stack[-1].end <= now:
            self._pop(self._stack[-1].end)

    def _pop(self, end: float) -> None:
        closed = self._stack.pop()
        if closed.call is not self._stack[-1].call:  # a frame that is left out stands for its caller
            closed.call.total += end - closed.begin
            closed.call.count += 1


def short_name(name: str) -> str:
    """Return an event's name without most folders, line numbers and addresses; a function comes first."""
    name = re.sub(r"^step \d+$", "step", name)
    name = re.sub(r"^(?:.*/)?([^/]+/[^/]+\.py)\(\d+\): (.*)$", r"\2 (\1)", name)
    return re.sub(r" at 0x[0-9a-f]+", "", name)


def boxes(root: TracedCall, *, least: float = 0.001) -> Iterator[Box]:
    """Yield the boxes of a tree, callers first; those narrower than ``least`` of the width are left out."""
    scale = root.total or 1.0
    queue = [(root, 0, 0.0)]
    while queue:
        call, depth, left = queue.pop()
        width = call.total / scale
        if width < least:
            continue
        yield Box(call.name, call.phase, depth, left, width, call.total / 1000, call.count)
        for child in call.children.values():
            queue.append((child, depth + 1, left))
            left += child.total / scale
