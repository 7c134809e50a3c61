"""The rounds of one strategy: what ``Strategy.start`` of Flower does, with measuring, saving and going on."""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from lossworks.cohort import Member
from lossworks.errors import LossworksError, RunError
from lossworks.files import write_atomically
from lossworks.tasks.interface import Mode
from lossworks.tensors import load_tensors, write_tensors
from lossworks.tracking import Journal, read_all
from lossworks_federated.privacy import with_privacy
from lossworks_federated.records import array_record, flattened, grouped, member_from
from lossworks_federated.server.client_table import ClientTable, Exchange, rows_of
from lossworks_federated.server.kept_models import BestModel
from lossworks_federated.server.measures import drift, held_out, loss_terms, spread
from lossworks_federated.server.personal_tests import (
    personal_spread,
    personal_tests,
    write_personal_tests,
)
from lossworks_federated.server.screening import REASONS, Received, last_line
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.specs import FederationSpec, StrategySpec
from lossworks_federated.strategies.asynchronous.interface import Asynchronous
from lossworks_federated.strategies.catalogue import strategy
from lossworks_federated.strategies.interface import Federated, StrategyPlan
from lossworks_federated.virtual.devices import Devices
from lossworks_federated.virtual.flights import Flights
from lossworks_federated.virtual.timed_grid import TimedGrid

if TYPE_CHECKING:
    from lossworks_federated.server.accountant import PrivacyAccountant

_SAVED = 2  # newest states that stay
_HOUR = 3600.0


class RoundFiles:
    """What one strategy and seed leaves in a folder.

    Args:
        path: The folder; created.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.journal = path / "metrics.jsonl"
        self.model = path / "model.safetensors"
        self.best = path / "best.safetensors"
        self.outcome = path / "outcome.json"
        self.table = path / "clients.parquet"
        self.spent = path / "privacy.safetensors"
        self.personalised = path / "personalised.parquet"
        self._states = path / "states"

    def save(self, server_round: int, groups: Mapping[str, Member], totals: Mapping[str, Any]) -> None:
        """Save everything that the next round needs, and drop old ones."""
        self._states.mkdir(exist_ok=True)
        file = self._states / f"{server_round:07d}.safetensors"
        write_tensors(file, flattened(groups), totals=json.dumps(totals))
        for old in sorted(self._states.glob("*.safetensors"))[:-_SAVED]:
            old.unlink()

    def metrics_until(self, server_round: int) -> dict[str, float]:
        """Return the last value of every figure that was recorded up to a round."""
        if not self.journal.is_file():
            return {}
        rows = [row for row in read_all(self.journal) if 0 < row["step"] <= server_round]
        return {name: value for row in rows for name, value in row["metrics"].items()}

    def rounds_done(self) -> int:
        """Return the round of the newest state, 0 if there is none."""
        saved = self.newest()
        return saved[0] if saved else 0

    def newest(self) -> tuple[int, dict[str, Member], dict[str, Any]] | None:
        """Return the newest whole state: its round, tensors and all else; None if there is none."""
        from safetensors import safe_open

        for file in sorted(self._states.glob("*.safetensors"), reverse=True):
            try:
                groups = grouped(load_tensors(file), ["model", "strategy"])
            except RunError:
                continue  # damaged: the one before it is used
            with safe_open(file, "pt") as found:
                return int(file.stem), groups, json.loads(found.metadata()["totals"])
        return None


@dataclass(frozen=True)
class FederationOutcome:
    """How one strategy with one seed ended.

    Attributes:
        status: finished, stopped or failed.
        rounds: Rounds done.
        reason: Why it failed.
        metrics: The last round's.
        clients: Figures and examples of each client's last test, by partition.
        obstacle: Why clients were not trained all at once, if they weren't.
        notes: What else a person should know, in sentences.
    """

    status: str
    rounds: int
    reason: str
    metrics: dict[str, float]
    clients: dict[str, dict[str, float]]
    obstacle: str | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> "FederationOutcome":
        """Return what ``write`` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write it as JSON, in one piece."""
        write_atomically(path, json.dumps(asdict(self), indent=1))


@dataclass(frozen=True, eq=False)
class _Turn:
    """What a round has given before it is measured.

    Attributes:
        model: The next global model; None if no reply is usable.
        exchanges: With all clients that were asked.
        trained: When their replies were there, by ``time.perf_counter``.
        further: What else is known of the round.
    """

    model: Member | None
    exchanges: list[Exchange]
    trained: float
    further: dict[str, float] = field(default_factory=dict)


class RoundLoop(ABC):
    """One strategy with one seed, from the first round or from where it stopped.

    Args:
        spec: The federation.
        chosen: The strategy.
        task: What its clients are told.
        initial: The model before the first round.
        grid: The engine.
        files: Where to save.
        learnt: What nodes with data of their own have agreed on, as JSON.

    Attributes:
        obstacle: Why clients are not trained all at once, if they aren't.
        compared: The figure in which clients are compared, as they report it, and which is better.
    """

    obstacle: str | None = None
    compared: tuple[str, Mode] = ("accuracy", "max")

    def __init__(
        self,
        spec: FederationSpec,
        chosen: StrategySpec,
        task: TaskSpec,
        initial: Member,
        grid: Grid,
        files: RoundFiles,
        learnt: str | None = None,
    ) -> None:
        self._spec, self._initial, self._files = spec, initial, files
        self.strategy = build_strategy(spec, chosen, task, files.path.name, learnt)
        clients = task.split.clients
        devices = Devices(spec.devices, clients, task.seed) if spec.devices.declared else None
        self._grid = TimedGrid(grid, devices, self.strategy.partition_of, task.local.epochs, chosen.deadline)
        self._wanted = min(spec.clients_per_round or clients, clients)
        self._first = self._wanted if chosen.over_selection > 1 else None
        self._outer: Strategy = with_privacy(self.strategy, spec.privacy)
        self._accountant = accountant_of(spec, self.strategy)
        self._timeout = spec.deadline_s or _HOUR
        self._best = BestModel(files.best)
        self._flights: Flights | None = None
        self._notes: dict[str, str] = {}  # by what they are about, so that each is said once

    @abstractmethod
    def held_out(self, model: Member) -> dict[str, float]:
        """Return what the server measures of a model on examples that no client has."""

    def trained(self, received: Received) -> dict[str, float]:
        """Return what is recorded of what clients report of a round's training."""
        return {"train/loss": received.mean("loss")}

    def terms(self, received: Received, new: Member) -> dict[str, float]:
        """Return the terms that the loss of the next model falls into, if they can be told."""
        del received, new
        return {}

    def run(self) -> FederationOutcome:
        """Do all rounds that are left and return how it ended.

        Raises:
            RunError: A round had too few usable replies, or an aggregate is not finite. The last good model
                is saved.
        """
        done, model = self._begin()
        status, reason = "stopped", "interrupted"
        metrics = self._files.metrics_until(done)
        try:
            table = ClientTable(self._files.table, done, self.compared[0])
            with Journal.open(self._files.journal) as journal, table:
                if done == 0:
                    journal.write(0, self.held_out(model) | self._virtual())
                while done < self._spec.rounds:
                    model, found, rows = self._round(done + 1, model)
                    done += 1
                    journal.write(done, found)
                    table.write(rows)
                    metrics |= found
                    if done % self._spec.checkpoint_every == 0 or done == self._spec.rounds:
                        self._save(done, model)
                if self._spec.measure.personalise:
                    found = self._personalised(done, model, self._spec.measure.personalise)
                    journal.write(done, found)
                    metrics |= found
            status, reason = "finished", ""
        except LossworksError as error:
            status, reason = "failed", str(error)
            raise
        finally:
            write_tensors(self._files.model, model)
            notes = tuple(self._notes.values())
            outcome = FederationOutcome(status, done, reason, metrics, self._clients(), self.obstacle, notes)
            outcome.write(self._files.outcome)
        return outcome

    def _begin(self) -> tuple[int, Member]:
        saved = self._files.newest()
        if self._accountant is not None:
            if self._files.spent.is_file():
                self._accountant.restore(load_tensors(self._files.spent))
            elif saved is not None:
                raise RunError(
                    f"{self._files.spent} is gone: it says how much privacy the first {saved[0]} rounds have "
                    "spent, and no round may go on without it; put it back, or start another run"
                )
        if saved is None:
            return 0, self._initial
        done, groups, totals = saved
        self.strategy.restore(groups["strategy"])
        self._grid.down, self._grid.up = totals["down"], totals["up"]
        self._grid.now = totals.get("now", 0.0)  # older states know of no virtual time
        self._notes = totals.get("notes", {})  # nor of these
        if self._flights is not None:
            self._flights.restore(groups, totals["flights"])
        return done, groups["model"]

    def _round(self, server_round: int, model: Member) -> tuple[Member, dict[str, float], np.ndarray]:
        """Do one round and return the next model, what was measured and the rows of its clients."""
        began = time.perf_counter()
        turn = (
            self._together(server_round, model)
            if self._flights is None
            else self._landed(self._flights, server_round, model)
        )
        received, new = self.strategy.received, turn.model
        usable = len(received.partitions)
        if new is None or usable < self._spec.min_replies:
            raise RunError(
                f"round {server_round}: {usable} usable replies of {len(turn.exchanges)}, fewer than "
                f"min_replies={self._spec.min_replies} ({received.described()}); the last global model is "
                f"{self._files.model}"
            )
        ended = time.perf_counter()
        found = {
            **self.trained(received),
            "round/asked": len(turn.exchanges),
            "round/usable": usable,
            **{f"round/{reason}": len(received.refused.get(reason, ())) for reason in REASONS},
            **turn.further,
            **self._virtual(),
            "seconds/clients": turn.trained - began,
            "seconds/aggregation": ended - turn.trained,
        }
        if self._accountant is not None:
            found["privacy/epsilon"] = self._accountant.epsilon
        tests = self.strategy.plan.tests(server_round)
        if tests:
            found |= self._measured(server_round, model, new)
            self._best.offer(server_round, found.get("server/loss", math.nan), new)
        tested = self.strategy.tested if tests else {}
        rows = rows_of(server_round, turn.exchanges, received, (model, new), tested, self.compared[0])
        found |= {
            "bytes/down": self._grid.down,
            "bytes/up": self._grid.up,
            "seconds/measuring": time.perf_counter() - ended,
        }
        return new, found, rows

    def _together(self, server_round: int, model: Member) -> _Turn:
        """Let the clients of a round train from one model."""
        self.strategy.present = self._grid.present()
        arrays = array_record(model)
        asked = list(self._outer.configure_train(server_round, arrays, ConfigRecord(), self._grid))
        self._note_exploration()
        self._spend(server_round)
        replies = self._grid.send_and_receive(asked, timeout=self._timeout, first=self._first)
        trained = time.perf_counter()
        of_nodes, seconds = self._grid.exchanged, self._grid.seconds
        aggregated, _ = self._outer.aggregate_train(server_round, replies)
        reasons = {client: reason for reason, who in self.strategy.received.refused.items() for client in who}
        exchanges = []
        for node, (down, up) in of_nodes.items():
            client = self.strategy.partition_of(node)
            took = seconds.get(node, math.nan)
            exchanges.append(Exchange(client, down, up, took, reasons.get(client, "")))
        exchanges.sort(key=lambda one: one.client)
        return _Turn(member_from(aggregated) if aggregated is not None else None, exchanges, trained)

    def _landed(self, flights: Flights, server_round: int, model: Member) -> _Turn:
        """Take in as many replies as a round of other strategies asks clients."""
        landed = flights.round(server_round, model, self._wanted)
        self.strategy.received = landed.received
        further = {"round/staleness": landed.staleness}
        return _Turn(landed.model, landed.exchanges, time.perf_counter(), further)

    def _virtual(self) -> dict[str, float]:
        return {} if self._grid.devices is None else {"virtual/seconds": self._grid.now}

    def _measured(self, server_round: int, model: Member, new: Member) -> dict[str, float]:
        received = self.strategy.received
        replies = self._tests(server_round, new, {})
        self._outer.aggregate_evaluate(server_round, replies)
        self._note_failed_tests(server_round, replies)
        found = self.held_out(new) | drift(received, model, new)
        found |= spread(self.strategy.tested, *self.compared)
        if self._spec.measure.terms and self._flights is None:  # all start from w⁰
            found |= self.terms(received, new)
        return found

    def _note_failed_tests(self, server_round: int, replies: Sequence[Message]) -> None:
        """Say of the first round with clients that could not test the model how many, and why."""
        failed = [reply for reply in replies if reply.has_error()]
        if failed:
            self._notes.setdefault(
                "tests",
                f"round {server_round}: {len(failed)} of {len(replies)} clients could not test the model, "
                f"and count in no figure of clients; the first says {last_line(failed[0].error.reason)!r}",
            )

    def _note_exploration(self) -> None:
        """Say which explorers are left out, if the strategy explores."""
        found = self.strategy.explored
        if found is None or not found.refused:
            return
        left_out, usable = sum(map(len, found.refused.values())), len(found.partitions)
        without = "" if usable else "; without any, clients train without guidance"
        self._notes["exploration"] = (
            f"exploration: the replies of {left_out} of {left_out + usable} explorers are left out "
            f"({found.described()}){without}"
        )

    def _personalised(self, server_round: int, model: Member, epochs: int) -> dict[str, float]:
        """Let clients fine-tune the last model and test it, write what each had of it, and return it all."""
        replies = self._tests(server_round, model, {"personalise": epochs})
        name, best = self.compared
        found = personal_tests(replies, self.strategy.partition_of, name)
        write_personal_tests(self._files.personalised, found, name)
        return personal_spread(found, best)

    def _tests(self, server_round: int, model: Member, told: Mapping[str, Any]) -> list[Message]:
        """Let clients test a model on their own examples, and return their replies."""
        before = self._grid.down, self._grid.up
        config, arrays = ConfigRecord(dict(told)), array_record(model)
        tests = self._outer.configure_evaluate(server_round, arrays, config, self._grid)
        replies = list(self._grid.send_and_receive(tests, timeout=self._timeout))
        # What measuring sends is no cost of the method.
        self._grid.down, self._grid.up = before
        return replies

    def _save(self, server_round: int, model: Member) -> None:
        groups = {"model": model, "strategy": self.strategy.state()}
        totals: dict[str, Any] = {"down": self._grid.down, "up": self._grid.up, "now": self._grid.now}
        totals["notes"] = self._notes
        if self._flights is not None:
            groups |= self._flights.tensors()
            totals["flights"] = self._flights.record()
        self._files.save(server_round, groups, totals)

    def _spend(self, server_round: int) -> None:
        """Count what a round about to begin spends of the clients' privacy.

        It is written before they are asked, so that a round that is repeated after an interruption counts
        twice, as its noise is drawn anew.
        """
        if self._accountant is None:
            return
        self._accountant.spend(self.strategy.asked, self.strategy.clients)
        epsilon, budget = self._accountant.epsilon, self._spec.privacy.budget
        if budget is not None and epsilon > budget:
            raise RunError(
                f"round {server_round} would bring ε to {epsilon:.4g}, above privacy.budget={budget:g}; "
                "rounds that were repeated, or had fewer clients to draw from, spent more than was planned"
            )
        write_tensors(self._files.spent, self._accountant.state())

    def _clients(self) -> dict[str, dict[str, float]]:
        return {
            str(partition): {**one.figures, "examples": one.examples}
            for partition, one in self.strategy.tested.items()
        }


class Rounds(RoundLoop):
    """Rounds of our own clients, whose held-out examples the server has.

    Args:
        spec: The federation.
        chosen: The strategy.
        setup: Of strategy and seed.
        grid: The engine.
        files: Where to save.
    """

    def __init__(
        self, spec: FederationSpec, chosen: StrategySpec, setup: SharedSetup, grid: Grid, files: RoundFiles
    ) -> None:
        super().__init__(spec, chosen, setup.task, setup.initial, grid, files)
        self._setup = setup
        self.obstacle = setup.learner.reason
        tracked = setup.kind.compared_by()
        self.compared = tracked.removeprefix("eval/"), setup.kind.yardsticks[tracked]
        if isinstance(self.strategy, Asynchronous):
            sizes = [len(rows) for rows in setup.split.train]
            under_way = self.strategy.concurrency or self._wanted
            self._flights = Flights(self.strategy, self._grid, sizes, under_way, self._timeout)

    def held_out(self, model: Member) -> dict[str, float]:
        """Return loss and yardsticks on the server's held-out examples."""
        return held_out(self._setup, model)

    def terms(self, received: Received, new: Member) -> dict[str, float]:
        """Return FedLD's terms of the loss; see :func:`lossworks_federated.server.measures.loss_terms`."""
        return loss_terms(self._setup, received, new)


def build_strategy(
    spec: FederationSpec,
    chosen: StrategySpec,
    task: TaskSpec,
    federation: str = "",
    learnt: str | None = None,
) -> Federated:
    """Return a strategy as a federation's spec asks for it.

    Args:
        spec: The federation.
        chosen: The strategy.
        task: What its clients are told.
        federation: Name under which clients keep what they keep.
        learnt: What nodes with data of their own have agreed on, as JSON.
    """
    plan = StrategyPlan(
        seed=task.seed,
        task=task.model_dump_json() if spec.app is None else None,
        federation=federation,
        checkpoint_every=spec.checkpoint_every,
        clients_per_round=spec.asked(chosen),
        clients_tested=spec.measure.clients,
        test_every=spec.measure.every,
        rounds=spec.rounds,
        guard=spec.guard,
        deadline_s=spec.deadline_s or _HOUR,
        terms=spec.measure.terms,
        updates=spec.updates,
        lr=task.local.lr,
        alike=spec.privacy.kind == "central",
        learnt=learnt,
    )
    return strategy(chosen.name)(plan=plan, also=chosen.also, **chosen.hyperparameters)


def accountant_of(spec: FederationSpec, chosen: Federated) -> "PrivacyAccountant | None":
    """Return what adds up the privacy that a strategy's rounds spend, or None if there is no noise.

    Raises:
        UserError: All rounds together would spend more than the budget.
    """
    if not spec.privacy.noisy:
        return None
    from lossworks_federated.server.accountant import PrivacyAccountant

    accountant = PrivacyAccountant(spec.privacy, secret=not any(part.keeps for part in chosen.parts))
    if spec.privacy.budget is not None:
        clients = spec.split.clients
        forecast = accountant.forecast(
            spec.rounds, lambda server_round: chosen.plan.trained_in(server_round, clients), clients
        )
        forecast.require_within(spec.privacy)
    return accountant
