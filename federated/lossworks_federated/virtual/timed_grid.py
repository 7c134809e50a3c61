"""A Grid around another in which virtual time passes while clients train."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from lossworks.errors import RunError
from lossworks_federated.engines.counted_grid import CountedGrid
from lossworks_federated.records import CONFIG, METRICS
from lossworks_federated.virtual.devices import Devices

_CHANGES_AWAITED = 100_000


class TimedGrid(CountedGrid):
    """Counts bytes and virtual seconds, and passes on only the replies that come in time.

    Instructions to train take the time of the slowest reply that is waited for. Testing takes none, since it
    is no part of a method.

    Args:
        inner: The grid that does the work.
        devices: Of the clients; None where nothing is said of them, so that all answer at once.
        partition_of: Gives the client of a node.
        epochs: Passes over the examples where an instruction doesn't say it.
        deadline: Virtual seconds after which a reply is late; None for no such limit.

    Attributes:
        now: Virtual seconds since the beginning.
        epochs: As given.
        seconds: By node, what the last instructions to train took to be answered, replies that came too late
            included.
    """

    def __init__(
        self,
        inner: Grid,
        devices: Devices | None,
        partition_of: Callable[[int], int],
        epochs: int,
        deadline: float | None = None,
    ) -> None:
        super().__init__(inner)
        self.devices, self.now = devices, 0.0
        self.seconds: dict[int, float] = {}
        self.deadline = deadline
        self._partition_of, self.epochs = partition_of, epochs

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None, first: int | None = None
    ) -> Iterable[Message]:
        """Pass messages on, and return the replies that come in time.

        Args:
            messages: All training or all testing.
            timeout: Real seconds to wait for.
            first: End the wait with so many replies; None to wait for all.
        """
        messages = list(messages)
        replies = list(self.exchange(messages, timeout=timeout))
        self.seconds = {}
        if self.devices is None or not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return replies
        return self._in_time(messages, replies, first)

    def exchange(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pass messages and all replies on while no virtual time passes."""
        return super().send_and_receive(messages, timeout=timeout)

    def present(self) -> np.ndarray | None:
        """Return which clients are there now, waiting until there is one; None where all always are.

        Raises:
            RunError: There will be none.
        """
        if self.devices is None:
            return None
        availability = self.devices.availability
        for _ in range(_CHANGES_AWAITED):
            there = availability.there(self.now)
            if there.any():
                return there
            later = availability.next_change(self.now)
            if later == math.inf:
                break
            self.now = later
        raise RunError(
            f"no client is there at {self.now:g} virtual seconds, nor later; see devices.availability"
        )

    def _in_time(self, messages: list[Message], replies: list[Message], first: int | None) -> list[Message]:
        """Return errors and the replies that come in time, and move the clock."""
        asked = {message.metadata.message_id: message for message in messages}
        errors = [reply for reply in replies if reply.has_error()]
        arrived = []
        for reply in replies:
            if reply.has_error():
                continue
            message = asked[reply.metadata.reply_to_message_id]
            client, seconds, lost = self._arrival(message, reply)
            self.seconds[message.metadata.dst_node_id] = seconds
            if not lost:
                arrived.append((seconds, client, reply))
        arrived.sort(key=lambda one: one[:2])  # at the same moment the lower number comes first
        missing = len(arrived) + len(errors) < len(messages)
        arrived = arrived[:first]
        enough = first is not None and len(arrived) == first
        whole = self.deadline if missing and not enough and self.deadline is not None else 0.0
        self.now += max([whole, *(seconds for seconds, _, _ in arrived[-1:])])
        return [*errors, *(reply for _, _, reply in arrived)]

    def _arrival(self, message: Message, reply: Message) -> tuple[int, float, bool]:
        """Return whose a reply is, how long it takes, and whether it is late or its client gone before."""
        if self.devices is None:
            return 0, 0.0, False
        node = message.metadata.dst_node_id
        client = self._partition_of(node)
        found: Any = reply.content.metric_records.get(METRICS, {})
        told: Any = message.content[CONFIG]
        examples = float(found.get("num-examples", 0)) * int(told.get("epochs", self.epochs))
        seconds = self.devices.seconds(client, examples, *self.exchanged[node])
        leaves = self.devices.availability.leaves(client, self.now, self.now + seconds)
        late = self.deadline is not None and seconds > self.deadline
        return client, seconds, late or leaves < self.now + seconds
