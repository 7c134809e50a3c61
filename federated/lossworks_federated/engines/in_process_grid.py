"""A Grid whose nodes are in this process: what the engines that need no other process have in common."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from lossworks_federated.flower_private import Run, identify, make_run, name_message

_RUN = 1


class NumberedNodes(Sequence[tuple[int, int]]):
    """Partition and node id of each of M clients, without a million objects: ids are partitions + 1.

    Args:
        clients: M.
    """

    def __init__(self, clients: int) -> None:
        self._clients = clients

    def __len__(self) -> int:
        return self._clients

    @overload
    def __getitem__(self, place: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[tuple[int, int]]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, int] | list[tuple[int, int]]:
        if isinstance(place, slice):
            return [(one, one + 1) for one in range(self._clients)[place]]
        partition = range(self._clients)[place]
        return partition, partition + 1


class InProcessGrid(Grid):
    """Answers messages as soon as they are pushed; any Flower strategy can use it.

    Node ids are partitions + 1.

    Args:
        clients: How many nodes there are.
        node_configs: Of each client, what its node's configuration holds besides its partition.
        contexts_last: Whether clients keep things in their contexts; a million contexts take gigabytes.
    """

    def __init__(
        self,
        clients: int,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        *,
        contexts_last: bool = True,
    ) -> None:
        identify(_RUN)
        self._run = make_run(_RUN)
        self._node_configs = node_configs
        self._contexts: dict[int, Context] = {}
        self._contexts_last = contexts_last
        self._sent = 0
        self._waiting: dict[str, Message] = {}
        self._clients, self.nodes = clients, NumberedNodes(clients)

    def set_run(self, run: Run) -> None:
        """Take a run; the grid needs none."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that ``set_run`` was given, or an empty one."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message; deprecated in Flower, and abstract all the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of all clients, sorted."""
        return [node for _, node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages at once, and return their ids for ``pull_messages``."""
        sent = list(messages)
        for message in sent:
            self._sent += 1
            name_message(message, str(self._sent))
        for reply in self.answers(sent):
            self._waiting[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies to messages, each once."""
        return [self._waiting.pop(name) for name in message_ids if name in self._waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Return the replies to messages."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    @abstractmethod
    def answers(self, messages: Sequence[Message]) -> list[Message]:
        """Return the replies to messages; whoever doesn't answer in time has none."""

    def context_of(self, partition: int) -> Context:
        """Return a client's context, which lasts as long as the grid unless clients keep nothing in it."""
        context = self._contexts.get(partition)
        if context is None:
            own = self._node_configs[partition] if self._node_configs else {}
            known = {"partition-id": partition, "num-partitions": self._clients}
            context = Context(
                run_id=_RUN,
                node_id=partition + 1,
                node_config={**own, **known},
                state=RecordDict(),
                run_config={},
            )
            if self._contexts_last:
                self._contexts[partition] = context
        return context
