"""Asynchronous federations: clients that start from the newest model and arrive one by one, in virtual time.

A flight is a client's training from the moment it is sent a model to that at which its reply arrives. The
model has a version, 0 at first, which each change of it raises; the staleness of a reply is how many versions
have been made since its flight started. All that arrive at one moment are taken in, in the order of their
numbers, before others start.
"""

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message, MessageType

from lossworks.cohort import Member, member_of
from lossworks_federated.records import array_record, payload_bytes
from lossworks_federated.server.client_table import Exchange
from lossworks_federated.server.screening import Received, screen
from lossworks_federated.spec_parts import GuardSpec
from lossworks_federated.strategies.asynchronous.interface import Arrived, Asynchronous
from lossworks_federated.virtual.timed_grid import TimedGrid

_REPEAT = 2**32  # between the numbers from which a client that starts twice from a version draws its orders


@dataclass
class Flight:
    """A client under way.

    Attributes:
        client: Its number.
        version: Of the model that it was sent.
        number: From which its orders are drawn, in place of a round's.
        start: When it was sent the model.
        arrival: When its reply arrives; until it is trained, when it does at the earliest.
        down: Bytes that it was sent.
        trained: Whether its reply is known.
        up: Bytes of its reply.
        seconds: From start to arrival, if a reply comes; NaN without speeds of devices.
        left_out: Why its reply can't be used; empty if it can.
        error: What the client says if it has failed.
        metrics: What it reports.
    """

    client: int
    version: int
    number: int
    start: float
    arrival: float
    down: int
    trained: bool = False
    up: int = 0
    seconds: float = math.nan
    left_out: str = ""
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Landed:
    """The replies of a round of an asynchronous federation.

    Attributes:
        model: The global model after the last of them.
        received: Those that are used, in the order in which they arrived.
        exchanges: Of all of them, in that order.
        staleness: Mean of those that are used.
    """

    model: Member
    received: Received
    exchanges: list[Exchange]
    staleness: float


class Flights:
    """Keeps clients under way and takes in their replies as they arrive.

    Flights of one version are trained at once, as late as possible.

    Args:
        strategy: What becomes of a reply.
        grid: The engine, and the clock.
        sizes: On how many examples each client trains, (M,).
        concurrency: How many clients are under way, where so many are there.
        timeout: Real seconds that replies are waited for.
    """

    def __init__(
        self,
        strategy: Asynchronous,
        grid: TimedGrid,
        sizes: Sequence[int],
        concurrency: int,
        timeout: float,
    ) -> None:
        self._strategy, self._grid, self._sizes, self._timeout = strategy, grid, sizes, timeout
        self._most = min(concurrency, len(sizes))
        self._version = self._refills = 0
        self._flights: dict[int, Flight] = {}
        self._updates: dict[int, Member] = {}
        self._models: dict[int, Member] = {}
        self._started: Counter[int] = Counter()  # how often clients have started from the newest version
        self._queue: list[tuple[float, int]] = []
        self._nodes: dict[int, int] = {}

    def round(self, server_round: int, model: Member, replies: int) -> Landed:
        """Go on until so many replies have arrived.

        Args:
            server_round: Its number, for messages.
            model: The global model.
            replies: How many, those that can't be used included.

        Raises:
            RunError: No client will be there, or the model is no longer finite.
        """
        self._models.setdefault(self._version, model)
        origin, landed, updates, stale = model, list[Flight](), list[Member](), list[int]()
        while len(landed) < replies:
            flight = self._due()
            if flight is None:
                self._fill()
                self._advance()
                continue
            landed.append(flight)
            self._grid.up += flight.up
            if not flight.left_out:
                stale.append(self._version - flight.version)
                updates.append(self._updates.pop(flight.client))
                self._take_in(flight, updates[-1], server_round)
            self._forget_models()
        return Landed(
            self._models[self._version],
            _received(landed, updates, origin),
            [Exchange(one.client, one.down, one.up, one.seconds, one.left_out) for one in landed],
            float(np.mean(stale)) if stale else math.nan,
        )

    def tensors(self) -> dict[str, Member]:
        """Return older models and replies under way, by group of a saved state."""
        older = [version for version in self._models if version != self._version]
        models = {f"version-{version}": self._models[version] for version in older}
        return models | {f"flight-{client}": update for client, update in self._updates.items()}

    def record(self) -> dict[str, Any]:
        """Return all else that ``restore`` needs, as JSON can hold it."""
        flights = [asdict(self._flights[client]) for client in sorted(self._flights)]
        started = sorted(self._started.items())
        return {
            "version": self._version,
            "refills": self._refills,
            "flights": flights,
            "started": started,
        }

    def restore(self, groups: Mapping[str, Member], record: Mapping[str, Any]) -> None:
        """Go on with what ``tensors`` and ``record`` returned, and the global model as ``model``."""
        self._version, self._refills = record["version"], record["refills"]
        self._started = Counter(dict(record["started"]))
        self._flights = {one["client"]: Flight(**one) for one in record["flights"]}
        self._models = {
            int(name.removeprefix("version-")): model
            for name, model in groups.items()
            if name.startswith("version-")
        }
        self._models[self._version] = groups["model"]
        self._updates = {
            int(name.removeprefix("flight-")): update
            for name, update in groups.items()
            if name.startswith("flight-")
        }
        self._queue = [(flight.arrival, client) for client, flight in self._flights.items()]
        heapq.heapify(self._queue)

    def _next(self) -> Flight | None:
        """Return the flight that arrives first, as far as is known; of several the lowest number's."""
        while self._queue:
            arrival, client = self._queue[0]
            flight = self._flights.get(client)
            if flight is not None and flight.arrival == arrival:
                return flight
            heapq.heappop(self._queue)  # of before it was trained
        return None

    def _due(self) -> Flight | None:
        """Return a flight that has arrived by now, out of the queue, or None if there is no more."""
        while (flight := self._next()) is not None and flight.arrival <= self._grid.now:
            if flight.trained:
                heapq.heappop(self._queue)
                return self._flights.pop(flight.client)
            self._train(flight.version)
        return None

    def _advance(self) -> None:
        """Move the clock to the next arrival, or to when somebody may come where places are free."""
        devices = self._grid.devices
        later = math.inf
        if devices is not None and len(self._flights) < self._most:
            later = devices.availability.next_change(self._grid.now)
        while (flight := self._next()) is not None and flight.arrival <= later:
            if flight.trained:
                self._grid.now = max(self._grid.now, flight.arrival)
                return
            self._train(flight.version)
        if later < math.inf:
            self._grid.now = later

    def _fill(self) -> None:
        """Let idle clients start from the newest model, so that enough are under way."""
        free = self._most - len(self._flights)
        if not free:
            return
        # With nobody under way the next arrival is that of whoever comes first.
        there = self._grid.present() if not self._flights else self._there()
        idle = np.ones(len(self._sizes), dtype=bool) if there is None else there.copy()
        idle[list(self._flights)] = False
        candidates = np.flatnonzero(idle)
        if not len(candidates):
            return
        self._refills += 1
        chosen = candidates[self._strategy.places(len(candidates), free, self._refills)]
        model = array_record(self._models[self._version])
        sizes: dict[int, int] = {}
        for client in chosen.tolist():
            number = self._version + 1 + self._started[client] * _REPEAT
            self._started[client] += 1
            if number not in sizes:
                sizes[number] = payload_bytes(self._strategy.content(number, model))
            self._start(client, number, sizes[number])

    def _there(self) -> np.ndarray | None:
        devices = self._grid.devices
        return None if devices is None else devices.availability.there(self._grid.now)

    def _start(self, client: int, number: int, down: int) -> None:
        now = self._grid.now
        flight = Flight(client, self._version, number, now, now, down)
        self._grid.down += down
        self._flights[client] = flight
        self._arrives(flight)

    def _arrives(self, flight: Flight) -> None:
        """Set when a flight arrives, or that it is lost, from what is known of its reply."""
        seconds = self._seconds(flight)
        flight.arrival = flight.start + seconds
        flight.seconds = seconds if flight.up and self._grid.devices is not None else math.nan
        if flight.left_out == "late" and self._grid.deadline is not None:
            flight.arrival = flight.start + self._grid.deadline  # no reply came, and it is waited so long for
        end = self._lost_at(flight)
        if end is not None:
            flight.trained, flight.left_out = True, "late"
            flight.arrival, flight.seconds = end, math.nan
            self._updates.pop(flight.client, None)
        heapq.heappush(self._queue, (flight.arrival, flight.client))

    def _seconds(self, flight: Flight) -> float:
        devices = self._grid.devices
        if devices is None:
            return 0.0
        examples = self._grid.epochs * self._sizes[flight.client]
        return devices.seconds(flight.client, examples, flight.down, flight.up)

    def _lost_at(self, flight: Flight) -> float | None:
        """Return when it is clear that a reply does not come in time; None if it does."""
        devices, deadline = self._grid.devices, self._grid.deadline
        if devices is None:
            return None
        end = devices.availability.leaves(flight.client, flight.start, flight.arrival)
        if deadline is not None:
            end = min(end, flight.start + deadline)
        return end if end < flight.arrival else None

    def _train(self, version: int) -> None:
        """Train all flights of a version that are not yet, at once."""
        flights = sorted(
            (one for one in self._flights.values() if one.version == version and not one.trained),
            key=lambda one: one.client,
        )
        model = self._models[version]
        record = array_record(model)
        self._nodes = self._nodes or dict(self._strategy.nodes(self._grid))  # in this process none goes away
        numbers = sorted({flight.number for flight in flights})
        contents = {number: self._strategy.content(number, record) for number in numbers}
        messages = [
            Message(contents[flight.number], self._nodes[flight.client], MessageType.TRAIN)
            for flight in flights
        ]
        counted = self._grid.down, self._grid.up
        replies = list(self._grid.exchange(messages, timeout=self._timeout))
        self._grid.down, self._grid.up = counted  # counted when it is sent and when it arrives
        clients = {
            message.metadata.message_id: flight.client
            for message, flight in zip(messages, flights, strict=True)
        }
        found = [(clients[reply.metadata.reply_to_message_id], reply) for reply in replies]
        found.sort(key=lambda pair: pair[0])
        received = screen(found, [flight.client for flight in flights], model, [], GuardSpec())
        places = {client: place for place, client in enumerate(received.partitions)}
        reasons = {client: reason for reason, who in received.refused.items() for client in who}
        sizes = {client: payload_bytes(reply.content) for client, reply in found if not reply.has_error()}
        for flight in flights:
            flight.trained = True
            flight.up = sizes.get(flight.client, 0)
            flight.left_out = reasons.get(flight.client, "")
            if flight.left_out:
                flight.error = received.said.get(flight.left_out, "")
            else:
                place = places[flight.client]
                flight.metrics = received.metrics[place]
                own = member_of(received.updates, place)
                self._updates[flight.client] = {name: value.clone() for name, value in own.items()}
            self._arrives(flight)

    def _take_in(self, flight: Flight, update: Member, server_round: int) -> None:
        arrived = Arrived(self._models[flight.version], update, self._version - flight.version)
        new = self._strategy.taken_in(self._models[self._version], arrived)
        if new is None:
            return
        self._strategy.check_finite(new, server_round)
        self._version += 1
        self._models[self._version] = new
        self._started.clear()

    def _forget_models(self) -> None:
        """Let go of versions that nobody under way has started from."""
        used = {flight.version for flight in self._flights.values()} | {self._version}
        for version in [version for version in self._models if version not in used]:
            del self._models[version]


def _received(landed: Sequence[Flight], updates: Sequence[Member], origin: Member) -> Received:
    """Return the replies of a round as those of a synchronous one are; w⁰ is where the round began."""
    used = [flight for flight in landed if not flight.left_out]
    refused: dict[str, list[int]] = {}
    for flight in landed:
        if flight.left_out:
            refused.setdefault(flight.left_out, []).append(flight.client)
    said = {flight.left_out: flight.error for flight in reversed(landed) if flight.error}
    if not used:
        return Received.nothing(refused, said)
    return Received(
        messages=(),
        partitions=tuple(flight.client for flight in used),
        examples=torch.tensor([flight.metrics["num-examples"] for flight in used], dtype=torch.float64),
        metrics=tuple(flight.metrics for flight in used),
        origin=origin,
        updates={name: torch.stack([update[name] for update in updates]) for name in updates[0]},
        sent={},
        refused={reason: tuple(who) for reason, who in refused.items()},
        said=said,
    )
