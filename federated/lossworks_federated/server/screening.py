"""Which replies of a round are usable, and why the others are not. m replies are usable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from lossworks.cohort import Member, Stack
from lossworks_federated.records import METRICS, MODEL, member_from
from lossworks_federated.spec_parts import GuardSpec

REASONS = {
    "late": "no reply before the end of the round",
    "failed": "an error in place of a reply",
    "empty": "no arrays, or no examples",
    "shape": "arrays of other names or shapes than were sent",
    "nonfinite": "NaN or infinity",
    "too_long": "an update longer than guard.largest_norm times the median",
    "opposed": "an update whose cosine with the median is below guard.least_cosine",
}
"""Why a reply is left out, in the order in which it is found."""


@dataclass(frozen=True, eq=False)
class Received:
    """The replies of a round, in the order of partitions.

    Attributes:
        messages: The usable ones.
        partitions: Whose they are.
        examples: On how many each trained, float64 (m,).
        metrics: What each reported.
        origin: w⁰.
        updates: g_i = w_i − w⁰, (m, …).
        sent: By slug of a part, what clients sent for it, (m, …).
        refused: By reason, the partitions of replies that are left out.
        error: What the first client that failed says.
    """

    messages: tuple[Message, ...]
    partitions: tuple[int, ...]
    examples: Tensor
    metrics: tuple[dict[str, float], ...]
    origin: Member
    updates: Stack
    sent: dict[str, Stack]
    refused: dict[str, tuple[int, ...]]
    error: str = ""

    @classmethod
    def nothing(cls, refused: Mapping[str, Sequence[int]] | None = None, error: str = "") -> "Received":
        """Return a round without a usable reply."""
        left_out = {reason: tuple(who) for reason, who in (refused or {}).items() if who}
        return cls((), (), torch.zeros(0, dtype=torch.float64), (), {}, {}, {}, left_out, error)

    def params(self, rows: slice) -> Stack:
        """Return where some of the clients ended, w_i.

        They are made of the updates, since a second stack of all would double the server's memory.
        """
        return {name: self.origin[name] + value[rows] for name, value in self.updates.items()}

    def column(self, name: str) -> Tensor:
        """Return what each client reported under a name, float64, shape (m,)."""
        return torch.tensor([one[name] for one in self.metrics], dtype=torch.float64)

    def mean(self, name: str) -> float:
        """Return the mean over all examples of what clients reported."""
        return float((self.examples * self.column(name)).sum() / self.examples.sum())


def screen(
    replies: Sequence[tuple[int, Message]],
    asked: Sequence[int],
    origin: Member,
    sending: Sequence[str],
    guard: GuardSpec,
) -> Received:
    """Return the usable replies of a round.

    Args:
        replies: With their partitions, sorted by them.
        asked: Partitions that were asked.
        origin: w⁰.
        sending: Slugs of the parts for which clients send arrays, named and shaped like the parameters.
        guard: What else is refused.
    """
    refused: dict[str, list[int]] = {reason: [] for reason in REASONS}
    heard = {partition for partition, _ in replies}
    refused["late"] = [partition for partition in asked if partition not in heard]
    shapes = {name: tuple(value.shape) for name, value in origin.items()}
    usable = []
    for partition, reply in replies:
        reason = _defect(reply, shapes, sending)
        if reason:
            refused[reason].append(partition)
        else:
            usable.append((partition, reply))
    error = next((_last_line(reply.error.reason) for _, reply in replies if reply.has_error()), "")
    if not usable:
        return Received.nothing(refused, error)
    messages = [reply for _, reply in usable]
    stacks = {which: _stacked(messages, which, origin) for which in (MODEL, *sending)}
    keep = torch.stack([_finite(stack) for stack in stacks.values()]).all(0)
    _note(refused["nonfinite"], usable, keep)
    updates = {name: value.sub_(origin[name]) for name, value in stacks.pop(MODEL).items()}
    for reason, good in _guarded(updates, keep, guard).items():
        _note(refused[reason], usable, good | ~keep)
        keep &= good
    if not keep.any():
        return Received.nothing(refused, error)
    if not keep.all():
        usable = [pair for pair, good in zip(usable, keep.tolist(), strict=True) if good]
        stacks = {which: _rows(stack, keep) for which, stack in stacks.items()}
        updates = _rows(updates, keep)
    for _, reply in usable:
        for slug in sending:
            del reply.content[slug]  # Flower's strategies take every array they find for parameters
    metrics = tuple(dict(_metrics(reply)) for _, reply in usable)
    return Received(
        messages=tuple(reply for _, reply in usable),
        partitions=tuple(partition for partition, _ in usable),
        examples=torch.tensor([one["num-examples"] for one in metrics], dtype=torch.float64),
        metrics=metrics,
        origin=origin,
        updates=updates,
        sent={slug: stacks[slug] for slug in sending},
        refused={reason: tuple(who) for reason, who in refused.items() if who},
        error=error,
    )


def _last_line(reason: str | None) -> str:
    """Return the line of an error's text that says what it was; Flower sends whole tracebacks."""
    lines = [line.strip(" '>") for line in (reason or "").replace("\\n", "\n").splitlines()]
    lines = [line for line in lines if line]
    return lines[-1].split("Message: ")[-1][-200:] if lines else ""


def _metrics(reply: Message) -> Any:
    return reply.content.metric_records.get(METRICS, {})


def _defect(reply: Message, shapes: Mapping[str, tuple[int, ...]], sending: Sequence[str]) -> str | None:
    """Return what is wrong with a reply before its numbers are looked at."""
    if reply.has_error():
        return "failed"
    arrays = reply.content.array_records
    examples = _metrics(reply).get("num-examples", 0)
    if not arrays.get(MODEL) or not isinstance(examples, int | float) or not examples > 0:
        return "empty"
    for which in (MODEL, *sending):
        found = {name: tuple(array.shape) for name, array in arrays.get(which, {}).items()}
        if found != dict(shapes):
            return "shape"
    return None


def _stacked(replies: Sequence[Message], which: str, like: Member) -> Stack:
    """Return what clients sent, in the server's dtypes whatever theirs are."""
    members = [member_from(reply.content.array_records[which]) for reply in replies]
    return {
        name: torch.stack([member[name].to(value.dtype) for member in members])
        for name, value in like.items()
    }


def _finite(stack: Stack) -> Tensor:
    """Return which members are finite, bool (m,)."""
    # The largest magnitude is one pass, and NaN or infinite where anything is.
    largest = [torch.linalg.vector_norm(value.flatten(1), torch.inf, dim=1) for value in stack.values()]
    return torch.stack(largest).isfinite().all(0)


def _guarded(updates: Stack, keep: Tensor, guard: GuardSpec) -> dict[str, Tensor]:
    """Return by reason which updates pass, bool (m,), judged by those that are kept."""
    passed: dict[str, Tensor] = {}
    if (guard.largest_norm is None and guard.least_cosine is None) or not keep.any():
        return passed
    flat = torch.cat([value.flatten(1) for value in updates.values()], 1).nan_to_num(0, 0, 0)
    norms = flat.norm(dim=1)
    if guard.largest_norm is not None:
        passed["too_long"] = norms <= guard.largest_norm * norms[keep].median()
    if guard.least_cosine is not None:
        middle = flat[keep].median(0).values
        cosines = flat @ middle / (norms * middle.norm()).clamp(min=1e-30)
        passed["opposed"] = cosines >= guard.least_cosine
    return passed


def _note(where: list[int], usable: Sequence[tuple[int, Message]], good: Tensor) -> None:
    where += [partition for (partition, _), fine in zip(usable, good.tolist(), strict=True) if not fine]


def _rows(stack: Stack, keep: Tensor) -> Stack:
    return {name: value[keep] for name, value in stack.items()}
