"""What a device takes for a reply, and when it is there; all times are virtual seconds from the beginning.

M clients. Draws depend on the seed alone, so that all strategies of a seed have the same devices.
"""

import csv
import math
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from lossworks.errors import UserError
from lossworks.files import reading
from lossworks_federated.virtual.device_specs import AmountSpec, AvailabilitySpec, DevicesSpec

_STREAM = 91
_AMOUNTS = ("speed", "bandwidth_down", "bandwidth_up", "latency")
_SHARE, _SLOT = len(_AMOUNTS), len(_AMOUNTS) + 1  # what further streams are for
_SLOTS_KEPT = 256


class Availability:
    """When devices are there; the default is always."""

    def __init__(self, clients: int) -> None:
        self.clients = clients

    def there(self, now: float) -> np.ndarray:
        """Return which clients are there, bool (M,)."""
        del now
        return np.ones(self.clients, dtype=bool)

    def leaves(self, client: int, now: float, by: float) -> float:
        """Return when a client that is there goes away, or infinity if not before ``by``."""
        del client, now, by
        return math.inf

    def next_change(self, now: float) -> float:
        """Return the next moment at which somebody may come, or infinity if nobody does."""
        del now
        return math.inf


class _Slots(Availability):
    """Each client is there in a share of slots of time, drawn for each."""

    def __init__(self, shares: np.ndarray, slot_s: float, seed: int) -> None:
        super().__init__(len(shares))
        self._slot_s = slot_s

        @lru_cache(_SLOTS_KEPT)
        def drawn(slot: int) -> np.ndarray:
            found: np.ndarray = (
                np.random.default_rng([seed, _STREAM, _SLOT, slot]).random(len(shares)) < shares
            )
            return found

        self._drawn = drawn

    def there(self, now: float) -> np.ndarray:
        """Return the draws of the slot."""
        return self._drawn(self._slot(now))

    def _slot(self, now: float) -> int:
        slot = int(now // self._slot_s)
        return slot + 1 if (slot + 1) * self._slot_s <= now else slot  # the quotient is rounded

    def leaves(self, client: int, now: float, by: float) -> float:
        """Return the beginning of the first slot in which it is away."""
        slot = self._slot(now) + 1
        while slot * self._slot_s < by:
            if not self._drawn(slot)[client]:
                return slot * self._slot_s
            slot += 1
        return math.inf

    def next_change(self, now: float) -> float:
        """Return the beginning of the next slot."""
        return (self._slot(now) + 1) * self._slot_s


class _Trace(Availability):
    """Each client is there in intervals [from, until); (n,) of all, sorted by client and beginning."""

    def __init__(self, clients: int, who: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> None:
        super().__init__(clients)
        self._who, self._begins, self._ends = who, begins, ends
        self._offsets = np.searchsorted(who, np.arange(clients + 1))
        self._moments = np.unique(begins)

    def there(self, now: float) -> np.ndarray:
        """Return whose intervals hold this moment."""
        found = np.zeros(self.clients, dtype=bool)
        found[self._who[(self._begins <= now) & (now < self._ends)]] = True
        return found

    def leaves(self, client: int, now: float, by: float) -> float:
        """Return the end of its interval, or of the last of those that follow without a gap."""
        own = slice(self._offsets[client], self._offsets[client + 1])
        begins, ends = self._begins[own], self._ends[own]
        place = int(np.searchsorted(begins, now, "right")) - 1
        while place + 1 < len(begins) and begins[place + 1] == ends[place]:
            place += 1
        end = float(ends[place])
        return end if end < by else math.inf

    def next_change(self, now: float) -> float:
        """Return the next beginning of an interval."""
        place = int(np.searchsorted(self._moments, now, "right"))
        return float(self._moments[place]) if place < len(self._moments) else math.inf


class Devices:
    """The devices of all clients.

    Args:
        spec: What is declared of them.
        clients: M.
        seed: Of the draws.

    Attributes:
        availability: When they are there.

    Raises:
        UserError: The trace can't be read, or holds what can't be.
    """

    def __init__(self, spec: DevicesSpec, clients: int, seed: int) -> None:
        amounts = [getattr(spec, name) for name in _AMOUNTS]
        drawn = [_drawn(amount, clients, seed, number) for number, amount in enumerate(amounts)]
        unlimited = np.full(clients, np.inf)
        self._speed, self._down, self._up = (unlimited if one is None else one for one in drawn[:3])
        self._latency = np.zeros(clients) if drawn[3] is None else drawn[3]
        self.availability = _availability(spec.availability, clients, seed)

    def seconds(self, client: int, examples: float, down: int, up: int) -> float:
        """Return the virtual seconds from an instruction to its reply.

        Args:
            client: Whose.
            examples: That it trains on, counted once for each epoch.
            down: Bytes of the instruction.
            up: Bytes of the reply.
        """
        computing = examples / self._speed[client]
        sending = down / self._down[client] + up / self._up[client]
        return float(computing + sending + self._latency[client])


def _drawn(amount: AmountSpec | None, clients: int, seed: int, number: int) -> np.ndarray | None:
    if amount is None:
        return None
    stream = np.random.default_rng([seed, _STREAM, number])
    if amount.lognormal is not None:
        return stream.lognormal(math.log(amount.lognormal.median), amount.lognormal.sigma, clients)
    if amount.uniform is not None:
        return stream.uniform(amount.uniform.low, amount.uniform.high, clients)
    return np.full(clients, amount.constant)


def _availability(spec: AvailabilitySpec | None, clients: int, seed: int) -> Availability:
    if spec is None:
        return Availability(clients)
    if spec.trace is not None:
        return read_trace(Path(spec.trace), clients)
    shares = _drawn(spec.share, clients, seed, _SHARE)
    return Availability(clients) if shares is None else _Slots(shares, spec.slot_s, seed)


def read_trace(file: Path, clients: int) -> Availability:
    """Return the availability that a CSV file with columns client, from and until tells.

    Raises:
        UserError: It can't be read, or a row of it holds no such interval or overlaps another; named by row.
    """
    rows: list[tuple[int, float, float, int]] = []
    with reading(file), file.open(newline="", encoding="utf-8-sig") as stream:
        table = csv.DictReader(stream)
        missing = [name for name in ("client", "from", "until") if name not in (table.fieldnames or ())]
        if missing:
            raise UserError(
                f"{file}: has no column {missing[0]}; a trace has the columns client, from, until"
            )
        rows += [_interval(file, table.line_num, row, clients) for row in table]
    rows.sort()
    for (client, begin, end, line), (other, start, stop, below) in pairwise(rows):
        if client == other and start < end:
            raise UserError(
                f"{file}, row {below}: client {client} is there from {start:g} until {stop:g}, which "
                f"overlaps row {line}, from {begin:g} until {end:g}"
            )
    who, begins, ends, _ = zip(*rows, strict=True) if rows else ((), (), (), ())
    return _Trace(clients, np.array(who, np.int64), np.array(begins, float), np.array(ends, float))


def _interval(file: Path, line: int, row: dict[str, str], clients: int) -> tuple[int, float, float, int]:
    try:
        client, begin, end = int(row["client"]), float(row["from"]), float(row["until"])
    except (TypeError, ValueError):
        told = ", ".join(str(row[name]) for name in ("client", "from", "until"))
        raise UserError(f"{file}, row {line}: {told}: must be a client's number and two times") from None
    if not 0 <= client < clients:
        raise UserError(f"{file}, row {line}: there is no client {client}, of 0 to {clients - 1}")
    if not 0 <= begin < end < math.inf:
        raise UserError(f"{file}, row {line}: from {begin:g} until {end:g} is no interval of times from 0 on")
    return client, begin, end, line
