"""Which replies of a round are usable, and why the others are not. m replies are usable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from lossworks.cohort import Member, Stack, all_finite
from lossworks_federated.records import METRICS, MODEL, member_from, shapes_of, unlike
from lossworks_federated.spec_parts import GuardSpec

REASONS = {
    "late": "no reply before the end of the round",
    "failed": "an error in place of a reply",
    "empty": "no arrays, or no examples",
    "part": "trained without what the strategy needs of clients",
    "shape": "arrays of other names or shapes than were sent",
    "nonfinite": "NaN or infinity",
    "too_long": "an update longer than guard.largest_norm times the median",
    "opposed": "an update whose cosine with the median is below guard.least_cosine",
}
"""Why a reply is left out, in the order in which it is found."""

_REMEDY = (
    "a client does its part and reports it if it trains within `local_rule` of "
    "lossworks_federated.apps.plain_torch; fedavg needs nothing of that"
)
_NAMES = {
    "train_loss": "loss",
    "eval_loss": "loss",
    "eval_acc": "accuracy",
    "eval_accuracy": "accuracy",
    "acc": "accuracy",
}
"""What quick-start apps of Flower call metrics, and what ours call them."""


@dataclass(frozen=True, eq=False)
class Received:
    """The replies of a round, in the order of partitions.

    Attributes:
        messages: The usable ones.
        partitions: Whose they are.
        examples: On how many each trained, float64 (m,).
        metrics: What each reported, by name; see ``metrics_of``.
        origin: w⁰.
        updates: g_i = w_i − w⁰, (m, …).
        sent: By slug of a part, what clients sent for it, (m, …).
        refused: By reason, the partitions of replies that are left out.
        said: By reason, what the first of these replies says or lacks, where that is known.
    """

    messages: tuple[Message, ...]
    partitions: tuple[int, ...]
    examples: Tensor
    metrics: tuple[dict[str, float], ...]
    origin: Member
    updates: Stack
    sent: dict[str, Stack]
    refused: dict[str, tuple[int, ...]]
    said: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def nothing(
        cls, refused: Mapping[str, Sequence[int]] | None = None, said: Mapping[str, str] | None = None
    ) -> "Received":
        """Return a round without a usable reply."""
        left_out = {reason: tuple(who) for reason, who in (refused or {}).items() if who}
        return cls((), (), torch.zeros(0, dtype=torch.float64), (), {}, {}, {}, left_out, said or {})

    def params(self, rows: slice) -> Stack:
        """Return where some of the clients ended, w_i.

        They are made of the updates, since a second stack of all would double the server's memory.
        """
        return {name: self.origin[name] + value[rows] for name, value in self.updates.items()}

    def column(self, name: str) -> Tensor:
        """Return what each client reported under a name, float64, shape (m,)."""
        return torch.tensor([one[name] for one in self.metrics], dtype=torch.float64)

    def reports(self, name: str) -> bool:
        """Return whether every client reported a number under a name."""
        return all(isinstance(one.get(name), int | float) for one in self.metrics)

    def mean(self, name: str) -> float:
        """Return the mean over all examples of what clients reported."""
        return float((self.examples * self.column(name)).sum() / self.examples.sum())

    def described(self) -> str:
        """Return in words how many replies are left out, whose and why."""
        parts = []
        for reason, who in self.refused.items():
            shown = ", ".join(map(str, who[:5])) + (", …" if len(who) > 5 else "")
            whose = f"clients {shown}, {len(who)} in all" if len(who) > 1 else f"client {shown}"
            says = f"; the first says {self.said[reason]!r}" if reason in self.said else ""
            parts.append(f"{REASONS[reason]}: {whose}{says}")
        return "; ".join(parts) or "all that were asked answered"


def screen(
    replies: Sequence[tuple[int, Message]],
    asked: Sequence[int],
    origin: Member,
    sending: Sequence[str],
    guard: GuardSpec,
    reporting: Sequence[str] = (),
) -> Received:
    """Return the usable replies of a round.

    Args:
        replies: With their partitions, sorted by them.
        asked: Partitions that were asked.
        origin: w⁰.
        sending: Slugs of the parts for which clients send arrays, named and shaped like the parameters.
        guard: What else is refused.
        reporting: Metrics that a reply must have besides ``num-examples``.
    """
    refused: dict[str, list[int]] = {reason: [] for reason in REASONS}
    heard = {partition for partition, _ in replies}
    refused["late"] = [partition for partition in asked if partition not in heard]
    shapes = {name: tuple(value.shape) for name, value in origin.items()}
    usable = []
    said: dict[str, str] = {}
    for partition, reply in replies:
        reason, says = _defect(reply, shapes, sending, reporting)
        if reason:
            refused[reason].append(partition)
            said.setdefault(reason, says)
        else:
            usable.append((partition, reply))
    if not usable:
        return Received.nothing(refused, said)
    messages = [reply for _, reply in usable]
    stacks = {which: _stacked(messages, which, origin) for which in (MODEL, *sending)}
    keep = torch.stack([_finite(stack) for stack in stacks.values()]).all(0)
    _note(refused["nonfinite"], usable, keep)
    updates = {name: value.sub_(origin[name].to(value.dtype)) for name, value in stacks.pop(MODEL).items()}
    for reason, good in _guarded(updates, keep, guard).items():
        _note(refused[reason], usable, good | ~keep)
        keep &= good
    if not keep.any():
        return Received.nothing(refused, said)
    if not keep.all():
        usable = [pair for pair, good in zip(usable, keep.tolist(), strict=True) if good]
        stacks = {which: _rows(stack, keep) for which, stack in stacks.items()}
        updates = _rows(updates, keep)
    for _, reply in usable:
        for slug in sending:
            del reply.content[slug]  # Flower's strategies take every array they find for parameters
    metrics = tuple(metrics_of(reply) for _, reply in usable)
    return Received(
        messages=tuple(reply for _, reply in usable),
        partitions=tuple(partition for partition, _ in usable),
        examples=torch.tensor([one["num-examples"] for one in metrics], dtype=torch.float64),
        metrics=metrics,
        origin=origin,
        updates=updates,
        sent={slug: stacks[slug] for slug in sending},
        refused={reason: tuple(who) for reason, who in refused.items() if who},
        said=said,
    )


def last_line(reason: str | None) -> str:
    """Return the line of an error's text that says what it was; Flower sends whole tracebacks."""
    lines = [line.strip(" '>") for line in (reason or "").replace("\\n", "\n").splitlines()]
    lines = [line for line in lines if line]
    return lines[-1].split("Message: ")[-1][-200:] if lines else ""


def metrics_of(reply: Message) -> dict[str, Any]:
    """Return what a reply reports; ``loss`` and ``accuracy`` also where Flower's templates name them else."""
    found = dict(_metrics(reply))
    return {_NAMES[name]: value for name, value in found.items() if name in _NAMES} | found


def _metrics(reply: Message) -> Any:
    return reply.content.metric_records.get(METRICS, {})


def _defect(
    reply: Message, shapes: Mapping[str, tuple[int, ...]], sending: Sequence[str], reporting: Sequence[str]
) -> tuple[str, str]:
    """Return what is wrong with a reply before its numbers are looked at, and what it says or lacks."""
    if reply.has_error():
        return "failed", last_line(reply.error.reason)
    found = shapes_of(reply.content)
    if not found.get(MODEL):
        return "empty", f"no arrays in a record {MODEL!r}"
    examples = _metrics(reply).get("num-examples")
    if not isinstance(examples, int | float) or not examples > 0:
        there = "none" if examples is None else repr(examples)
        return "empty", f"num-examples in a record {METRICS!r}: {there}"
    missing = [name for name in reporting if name not in _metrics(reply)]
    if missing:
        return "part", f"no {missing[0]} in a record {METRICS!r}; {_REMEDY}"
    for which in (MODEL, *sending):
        wrong = unlike(found.get(which, {}), shapes)
        if wrong:
            return "shape", f"{which}: {wrong}"
    return "", ""


def _stacked(replies: Sequence[Message], which: str, like: Member) -> Stack:
    """Return what clients sent, in the server's dtypes whatever theirs are, and whole numbers as float64."""
    members = [member_from(reply.content.array_records[which]) for reply in replies]
    dtypes = {
        name: value.dtype if value.is_floating_point() else torch.float64 for name, value in like.items()
    }
    return {
        name: torch.stack([member[name].to(dtype) for member in members]) for name, dtype in dtypes.items()
    }


def _finite(stack: Stack) -> Tensor:
    """Return which members are finite, bool (m,)."""
    return torch.stack([all_finite(value) for value in stack.values()]).all(0)


def _guarded(updates: Stack, keep: Tensor, guard: GuardSpec) -> dict[str, Tensor]:
    """Return by reason which updates pass, bool (m,), judged by those that are kept."""
    passed: dict[str, Tensor] = {}
    if (guard.largest_norm is None and guard.least_cosine is None) or not keep.any():
        return passed
    flat = torch.cat([value.reshape(len(value), -1) for value in updates.values()], 1).nan_to_num(0, 0, 0)
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
