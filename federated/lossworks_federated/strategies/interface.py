"""What every strategy has: repeatable draws, checked replies, sums in a fixed order, state that is saved.

A strategy is a class with :class:`Federated` first and :class:`Reproducible` last, and between them the class
of Flower's that it is, if any: Flower's call ``super()`` and so reach :class:`Reproducible` where they mean
FedAvg. m replies are usable in a round, of the clients that were asked.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.entry import Entry
from lossworks.cohort import Member, Stack
from lossworks.errors import RunError
from lossworks_federated.client.update_coding import coding_of
from lossworks_federated.records import (
    CONFIG,
    MODEL,
    array_record,
    flattened,
    grouped,
    member_from,
    part_mark,
)
from lossworks_federated.server.screening import Received, metrics_of, screen
from lossworks_federated.spec_parts import GuardSpec, UpdatesSpec
from lossworks_federated.strategies.catalogue import (
    ASYNCHRONOUS,
    AVERAGES,
    CLIENT_PART,
    EXCHANGES,
    KEEPS,
    PLAIN_SGD,
    REPORTS,
    WHOLE_UPDATES,
    part_of,
)
from lossworks_federated.strategies.parts import Part

_TRAIN, _TEST, _EXPLORE = range(3)  # what a draw is for
Nodes = Sequence[tuple[int, int]]
"""Partition and node id of every client, sorted."""


@dataclass(frozen=True)
class StrategyPlan:
    """What a strategy is told besides its hyperparameters.

    Attributes:
        seed: Of the draws of clients.
        clients_per_round: How many train in a round; all if None.
        clients_tested: How many test the global model; all if None.
        test_every: Rounds between tests.
        rounds: The last round, which is always tested; None if unknown.
        task: What clients are told, as JSON; see :class:`lossworks_federated.specs.TaskSpec`. None for
            apps of others, which know it.
        federation: Name under which clients keep what they keep.
        checkpoint_every: Rounds between states that the server saves.
        guard: Which replies are refused.
        deadline_s: Seconds to wait for replies outside of rounds.
        terms: Whether clients measure their loss after training, in rounds that are tested.
        updates: How clients send their updates.
        lr: Learning rate that clients are told; None for their own.
        alike: Whether clients count alike in a mean that is weighted by examples otherwise.
        learnt: What nodes with data of their own have agreed on, as JSON; None for others.
    """

    seed: int = 0
    clients_per_round: int | None = None
    clients_tested: int | None = None
    test_every: int = 1
    rounds: int | None = None
    task: str | None = None
    federation: str = ""
    checkpoint_every: int = 1
    guard: GuardSpec = field(default_factory=GuardSpec)
    deadline_s: float = 3600.0
    terms: bool = False
    updates: UpdatesSpec = field(default_factory=UpdatesSpec)
    lr: float | None = None
    alike: bool = False
    learnt: str | None = None

    def tests(self, server_round: int) -> bool:
        """Return whether the global model is tested after a round."""
        return server_round % self.test_every == 0 or server_round == self.rounds

    def trained_in(self, server_round: int, present: int) -> np.ndarray:
        """Return which of the clients that are there train in a round, rising."""
        return _places(self.seed, present, self.clients_per_round, server_round, _TRAIN)


@dataclass(frozen=True)
class OwnTest:
    """A client's test of the global model on its own examples: how many, and loss and yardsticks by name."""

    examples: int
    figures: dict[str, float]


class Federated(Entry, Strategy):
    """A strategy as it is declared, and the parts that its clients have.

    Args:
        plan: Draws and checks.
        also: Parts of other methods to add, as mappings of ``name`` and hyperparameters.
        hyperparameters: Those that the class declares.

    Attributes:
        part: Its part in clients, if it has one, which is given the same hyperparameters.
        averages: Whether the next model is w⁰ plus the mean update, weighted by examples.
        whole_updates: Whether the server compares clients' updates with each other, or keeps a sum of them
            that clients keep, too, so that compressed ones won't do.
        asynchronous: Whether it takes in replies one by one.
        reports: Names of the metrics of clients that it reads besides ``num-examples``.

    Raises:
        UserError: A hyperparameter is unknown or out of range.
    """

    section = "strategies"
    kind = "strategy"
    example = "lossworks federate federated/specs/digits.yaml strategies=[{slug}]"
    part: ClassVar[type[Part] | None] = None
    averages: ClassVar[bool] = False
    whole_updates: ClassVar[bool] = False
    asynchronous: ClassVar[bool] = False
    reports: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        plan: StrategyPlan | None = None,
        also: Sequence[Mapping[str, Any]] = (),
        **hyperparameters: Any,
    ) -> None:
        self.set_hyperparameters(hyperparameters)
        super().__init__(**self.flower_arguments())
        self.plan = plan or StrategyPlan()
        own = {"name": self.slug, **self.settings()}
        described = [own, *map(dict, also)] if self.part else [dict(entry) for entry in also]
        pairs = [(entry, part_of(entry)) for entry in described]
        self.described = [entry for entry, part in pairs if not part.idle]
        self.parts = [part for _, part in pairs if not part.idle]

    @classmethod
    def declaration(cls) -> Declaration:
        """Return all that is declared here; what is known of the parts is among the flags."""
        part = cls.part
        known = {
            CLIENT_PART: part is not None,
            AVERAGES: cls.averages,
            EXCHANGES: part is not None and part.exchanges,
            PLAIN_SGD: part is not None and part.plain_sgd,
            WHOLE_UPDATES: cls.whole_updates,
            KEEPS: part is not None and part.keeps,
            ASYNCHRONOUS: cls.asynchronous,
            REPORTS: bool(cls.reports),
        }
        flags = (*cls.flags, *(flag for flag, holds in known.items() if holds))
        return replace(super().declaration(), flags=flags)

    def flower_arguments(self) -> dict[str, Any]:
        """Return what the constructor of Flower's class is given; FedAvg's needs nothing."""
        return {}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord | None]:
        """Aggregate usable replies; the result has the dtypes that were sent.

        Some of Flower's strategies give float64.

        Raises:
            RunError: No reply is usable, or the aggregate is not finite.
        """
        found, metrics = super().aggregate_train(server_round, replies)  # type: ignore[safe-super]
        if found is None:
            # Flower's own loop would go on with the old parameters, round by round, and say nothing.
            lost = sum(map(len, self.received.refused.values()))
            raise RunError(f"round {server_round}: 0 usable replies of {lost} ({self.received.described()})")
        typed = {name: _typed(value, self.origin[name]) for name, value in member_from(found).items()}
        self.check_finite(typed, server_round)
        return array_record(typed), metrics

    def state(self) -> Member:
        """Return everything that the next round depends on besides the global model."""
        return flattened({part.slug: part.state() for part in self.parts} | {"server": self.server_state()})

    def restore(self, state: Member) -> None:
        """Go on with what ``state`` returned."""
        groups = grouped(state, ["server", *(part.slug for part in self.parts)])
        for part in self.parts:
            part.restore(groups[part.slug])
        self.restore_server(groups["server"])

    def server_state(self) -> Member:
        """Return what the server itself keeps, without its parts."""
        return {}

    def restore_server(self, state: Member) -> None:
        """Go on with what ``server_state`` returned."""

    origin: Member
    plan: StrategyPlan
    received: Received
    explored: Received | None
    tested: dict[int, OwnTest]
    drawn: Any
    partition_of: Any
    present: Any
    asked: Any
    clients: int

    def check_finite(self, member: Member, server_round: int) -> None:
        """Refuse an aggregate that holds NaN or infinity.

        Raises:
            RunError: Naming the parameter.
        """
        bad = [name for name, value in member.items() if not value.isfinite().all()]
        if bad:
            raise RunError(
                f"round {server_round}: the aggregated {bad[0]} of {self.slug} is not finite, though every "
                "reply is; a server learning rate may be too large"
            )


class Reproducible(FlowerFedAvg):
    """FedAvg with the same clients and the same sums for the same seed, in every engine.

    Clients are drawn by a generator of (seed, round) from those sorted by partition. Replies that are errors,
    empty, of a wrong shape, not finite, or refused by the guard are left out and counted in ``received``; the
    others are taken in the order of their partitions.

    Attributes:
        received: The last round's replies.
        tested: By partition, each client's last test.
        present: Which clients can be asked, bool (M,); all if None.
        explored: What came of an exploration before the first round; None without one.
    """

    plan: StrategyPlan
    parts: list[Part]
    described: list[dict[str, Any]]
    reports: ClassVar[tuple[str, ...]]

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.origin: Member = {}
        self.received: Received = Received.nothing()
        self.explored: Received | None = None
        self.tested: dict[int, OwnTest] = {}
        self.clients = 0
        self.present: np.ndarray | None = None
        self._partitions: dict[int, int] = {}
        self._numbered = False  # whether ids are partitions + 1, as in our own grids
        self._asked: list[tuple[int, Message]] = []

    @property
    def asked(self) -> list[int]:
        """Partitions of the clients that the last instructions went to."""
        return [partition for partition, _ in self._asked]

    def combine(self, received: Received) -> Member:
        """Return the next global parameters: w⁰ + Σ p_i g_i, p_i the share of examples of client i.

        Under ``plan.alike`` all p_i are 1/m.
        """
        shares = received.examples / received.examples.sum()
        return moved(self.origin, received.updates, equal_weights(received) if self.plan.alike else shares)

    def summary(self) -> None:
        """Say nothing: Lossworks shows what a person needs."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return instructions for the clients drawn for a round."""
        self.origin = member_from(arrays)
        nodes = self.nodes(grid)
        self.clients = len(nodes)
        if self.present is not None:
            nodes = [pair for pair in nodes if self.present[pair[0]]]
        chosen = self.drawn(nodes, self.plan.clients_per_round, server_round, _TRAIN)
        partitions = [partition for partition, _ in chosen]
        for part in self.parts:
            part.before(partitions, lambda share, epochs: self._explore(share, epochs, nodes, arrays, grid))
        terms = self.plan.terms and self.plan.tests(server_round)
        content = self.content(server_round, arrays, config, terms=terms)
        return self._messages(content, chosen, MessageType.TRAIN)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return instructions for the clients that test the global model after this round, if any."""
        if not self.plan.tests(server_round):
            return []
        chosen = self.drawn(self.nodes(grid), self.plan.clients_tested, server_round, _TEST)
        content = self.content(server_round, arrays, config)
        return self._messages(content, chosen, MessageType.EVALUATE)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next global parameters and the mean loss, if clients report one.

        Both are None if no reply is usable.
        """
        del server_round
        good, _ = self._check_and_log_replies(replies, is_train=True)
        if not good:
            return None, None
        record = array_record(self.combine(self.received))
        told = ["loss"] if self.received.reports("loss") else []
        return record, MetricRecord({name: self.received.mean(name) for name in told})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of each figure over the examples of the clients that answered."""
        del server_round
        self.tested = {}
        for partition, reply in self._known(replies):
            if reply.has_error():
                continue
            found = metrics_of(reply)
            if found.get("num-examples"):
                figures = {
                    name: float(value)
                    for name, value in found.items()
                    if name != "num-examples" and isinstance(value, int | float)
                }
                self.tested[partition] = OwnTest(int(found["num-examples"]), figures)
        names = dict.fromkeys(name for one in self.tested.values() for name in one.figures)
        return MetricRecord({name: self._tested_mean(name) for name in names}) if names else None

    def _tested_mean(self, name: str) -> float:
        """Return the mean of a figure over the examples of the clients that know it."""
        known = [one for one in self.tested.values() if name in one.figures]
        return sum(one.figures[name] * one.examples for one in known) / sum(one.examples for one in known)

    def content(
        self, server_round: int, arrays: ArrayRecord, config: Mapping[str, Any] | None = None, **more: Any
    ) -> RecordDict:
        """Return what goes to clients: model, further arrays of parts, and configuration."""
        settings = ConfigRecord({**(config or {}), **self._told(), "server-round": server_round, **more})
        content = RecordDict({MODEL: arrays, CONFIG: settings})
        for part in self.parts:
            further = part.to_clients(self.origin)
            if further:
                content[part.slug] = array_record(further)
        return content

    def nodes(self, grid: Grid) -> Nodes:
        """Return the clients there are, asking those that are new for their partition."""
        known: Nodes | None = getattr(grid, "nodes", None)
        self._numbered = known is not None
        if known is not None:
            return known
        present = list(grid.get_node_ids())
        new = [node for node in present if node not in self._partitions]
        if new:
            question = RecordDict({CONFIG: ConfigRecord()})
            asked = [Message(question, node, MessageType.QUERY) for node in new]
            for reply in grid.send_and_receive(asked):
                if not reply.has_error():
                    answer: Any = reply.content[CONFIG]
                    self._partitions[reply.metadata.src_node_id] = int(answer["partition-id"])
            self._take_in_strangers([node for node in new if node not in self._partitions])
            self._require_apart(present)
        return sorted((self._partitions[node], node) for node in present if node in self._partitions)

    def _take_in_strangers(self, nodes: Sequence[int]) -> None:
        """Number nodes of another app, which don't answer which partition is theirs, behind those that do."""
        first = max(self._partitions.values(), default=-1) + 1
        self._partitions.update({node: first + place for place, node in enumerate(sorted(nodes))})

    def partition_of(self, node: int) -> int:
        """Return the partition of a node that ``nodes`` has found."""
        return node - 1 if self._numbered else self._partitions[node]

    def _require_apart(self, present: Sequence[int]) -> None:
        """Refuse two nodes that say the same partition.

        Raises:
            RunError: Naming them.
        """
        of: dict[int, int] = {}
        for node in present:
            partition = self._partitions[node]
            if partition in of:
                raise RunError(
                    f"nodes {of[partition]} and {node} both say that they have partition {partition}"
                )
            of[partition] = node

    def drawn(self, nodes: Nodes, count: int | None, server_round: int, purpose: int = _TRAIN) -> Nodes:
        """Return the clients drawn for a round, sorted; all if ``count`` is None or more than there are."""
        places = self.places(len(nodes), count, server_round, purpose)
        return [nodes[place] for place in places.tolist()]

    def places(self, of: int, count: int | None, number: int, purpose: int = _TRAIN) -> np.ndarray:
        """Return which of so many are drawn, sorted; all if ``count`` is None or more than there are."""
        return _places(self.plan.seed, of, count, number, purpose)

    def _explore(self, share: float, epochs: int, nodes: Nodes, arrays: ArrayRecord, grid: Grid) -> Received:
        """Let a share of the clients train plainly from w⁰, outside a round, and return usable replies."""
        chosen = self.drawn(nodes, max(1, round(share * len(nodes))), 0, _EXPLORE)
        settings = ConfigRecord({**self._told(), "parts": "[]", "server-round": 0, "epochs": epochs})
        content = RecordDict({MODEL: arrays, CONFIG: settings})
        replies = grid.send_and_receive(
            self._messages(content, chosen, MessageType.TRAIN), timeout=self.plan.deadline_s
        )
        self.explored = screen(self._known(replies), self.asked, self.origin, [], self.plan.guard)
        return self.explored

    def _check_and_log_replies(
        self, replies: Iterable[Message], is_train: bool, validate: bool = True
    ) -> tuple[list[Message], list[Message]]:
        """Return the usable replies in the order of partitions, and the errors.

        All of Flower's strategies ask this method for the replies they aggregate.
        """
        del is_train, validate
        coding = coding_of(self.plan.updates)
        replies = list(replies) if coding is None else [coding.read_reply(self.origin, r) for r in replies]
        sending = [part.slug for part in self.parts if part.sends]
        needed = [*(part_mark(part.slug) for part in self.parts), *self.reports]
        received = screen(self._known(replies), self.asked, self.origin, sending, self.plan.guard, needed)
        self.received = received
        if received.messages:
            for part in self.parts:
                part.absorb(received.sent.get(part.slug, {}), received.updates, self.clients)
        return list(received.messages), [reply for reply in replies if reply.has_error()]

    def _known(self, replies: Iterable[Message]) -> list[tuple[int, Message]]:
        """Return replies with their partitions, sorted by them.

        They are matched by the instruction they answer, since the server answers for clients it has lost.
        """
        ids = {asked.metadata.message_id: partition for partition, asked in self._asked}
        found = []
        for reply in replies:
            partition = ids.get(reply.metadata.reply_to_message_id)
            if partition is None:
                partition = self._partitions.get(reply.metadata.src_node_id)
            if partition is not None:
                found.append((partition, reply))
        return sorted(found, key=lambda pair: pair[0])

    def _told(self) -> dict[str, Any]:
        """Return the configuration that clients get with every instruction."""
        plan = self.plan
        return {
            "parts": json.dumps(self.described),
            **({} if plan.task is None else {"task": plan.task}),
            "seed": plan.seed,
            "federation": plan.federation,
            "checkpoint-every": plan.checkpoint_every,
            **({} if plan.lr is None else {"lr": plan.lr}),
            **({} if plan.learnt is None else {"learnt": plan.learnt}),
        }

    def _messages(self, content: RecordDict, chosen: Nodes, kind: str) -> list[Message]:
        self._asked = [(partition, Message(content, node, kind)) for partition, node in chosen]
        return [message for _, message in self._asked]


def _typed(value: Tensor, like: Tensor) -> Tensor:
    """Return an aggregate in the dtype that was sent; means of whole numbers are rounded."""
    return value.to(like.dtype) if like.is_floating_point() else value.round().to(like.dtype)


def _places(seed: int, of: int, count: int | None, server_round: int, purpose: int) -> np.ndarray:
    """Return ``count`` of ``of`` places, drawn without replacement, rising; all if None or too many."""
    if count is None or count >= of:
        return np.arange(of)
    return np.sort(np.random.default_rng([seed, server_round, purpose]).choice(of, count, replace=False))


def equal_weights(received: Received) -> Tensor:
    """Return 1/m for each of the usable replies, float64 (m,)."""
    m = len(received.partitions)
    return torch.full((m,), 1 / m, dtype=torch.float64)


def moved(origin: Member, updates: Stack, weights: Tensor) -> Member:
    """Return w⁰ + Σ_i weights_i · g_i.

    Args:
        origin: w⁰.
        updates: g_i, (m, …).
        weights: Shape (m,).
    """
    return {
        name: origin[name] + torch.tensordot(weights.to(update), update, dims=1)
        for name, update in updates.items()
    }
