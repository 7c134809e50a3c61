"""A Grid around another that counts what goes through it."""

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from lossworks_federated.flower_private import Run
from lossworks_federated.records import payload_bytes


class CountedGrid(Grid):
    """Counts the bytes of arrays, as they would be sent, whatever the engine.

    Args:
        inner: The grid that does the work.

    Attributes:
        down: Bytes to clients so far.
        up: Bytes from them.
        exchanged: Bytes to and from each node in the last ``send_and_receive``, by its id.
    """

    def __init__(self, inner: Grid) -> None:
        self._inner = inner
        self.down = self.up = 0
        self.exchanged: dict[int, tuple[int, int]] = {}
        known = getattr(inner, "nodes", None)
        if known is not None:
            self.nodes: Sequence[tuple[int, int]] = known

    def set_run(self, run: Run) -> None:
        """Pass the run on to the inner grid."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The run of the inner grid."""
        return self._inner.run

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Return a message of the inner grid."""
        return self._inner.create_message(*arguments, **named)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the inner grid's nodes."""
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Pass messages on and count them."""
        messages = list(messages)
        self._count_down(messages)
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pass replies on and count them."""
        replies = list(self._inner.pull_messages(message_ids))
        self._count_up(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass messages and replies on and count them."""
        messages = list(messages)
        self.exchanged = {}
        if not messages:
            return []
        down = self._count_down(messages)
        replies = list(self._inner.send_and_receive(messages, timeout=timeout))
        up = self._count_up(replies)
        for message, size in zip(messages, down, strict=True):
            sent_back = up.get(message.metadata.message_id, 0)
            self.exchanged[message.metadata.dst_node_id] = (size, sent_back)
        return replies

    def _count_down(self, messages: list[Message]) -> list[int]:
        """Count messages and return the bytes of each."""
        sizes: dict[int, int] = {}
        for message in messages:
            content: RecordDict = message.content
            if id(content) not in sizes:  # one instruction is shared by all its clients
                sizes[id(content)] = payload_bytes(content)
        each = [sizes[id(message.content)] for message in messages]
        self.down += sum(each)
        return each

    def _count_up(self, replies: list[Message]) -> dict[str, int]:
        """Count replies and return the bytes of each, by the id of the message that it answers."""
        sizes = {
            reply.metadata.reply_to_message_id: payload_bytes(reply.content)
            for reply in replies
            if not reply.has_error()
        }
        self.up += sum(sizes.values())
        return sizes
