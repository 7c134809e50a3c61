"""A Grid whose clients live in this process and are trained at once."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lossworks_federated.client.client_app import DROPPED_OUT, as_records
from lossworks_federated.client.client_memory import bytes_kept
from lossworks_federated.client.client_work import Client, Reply, evaluate_clients, train_clients
from lossworks_federated.flower_private import Run, failed, identify, make_run, name_message
from lossworks_federated.privacy import client_mods
from lossworks_federated.records import CONFIG
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.spec_parts import PrivacySpec

_RUN = 1
_KEPT_IN_MEMORY = 2**29
"""Bytes of what clients keep that stay in memory where it is on disk as well; the rest is read again."""


class CohortGrid(Grid):
    """Hands a round's messages to the cohort engine; any Flower strategy can use it.

    Messages of one instruction are answered at once. Node ids are partitions + 1. A client that is made to
    straggle gives no reply, as if the deadline had passed.

    Args:
        setup: What clients have in common.
        state_folder: Where clients keep things beyond the end of this process; None for nowhere.
        privacy: Flower's mods around each reply.
    """

    def __init__(
        self, setup: SharedSetup, state_folder: Path | None = None, privacy: PrivacySpec | None = None
    ) -> None:
        identify(_RUN)
        self._setup, self._folder = setup, state_folder
        self._mods = client_mods(privacy or PrivacySpec())
        self._contexts: dict[int, Context] = {}
        self._kept: dict[int, int] = {}
        self._run = make_run(_RUN)
        self._sent = 0
        self._waiting: dict[str, Message] = {}
        self.partitions = {client + 1: client for client in range(setup.task.split.clients)}

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
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages at once, and return their ids for ``pull_messages``."""
        sent = list(messages)
        for message in sent:
            self._sent += 1
            name_message(message, str(self._sent))
        for reply in self._answers(sent):
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

    def _answers(self, messages: list[Message]) -> list[Message]:
        groups: dict[tuple[str, int], list[Message]] = {}
        for message in messages:
            groups.setdefault((message.metadata.message_type, id(message.content)), []).append(message)
        return [answer for (kind, _), group in groups.items() for answer in self._group(kind, group)]

    def _group(self, kind: str, group: list[Message]) -> list[Message]:
        clients = [self._client(message.metadata.dst_node_id) for message in group]
        if kind == MessageType.QUERY:
            known = [ConfigRecord({"partition-id": client.partition}) for client in clients]
            return [
                Message(RecordDict({CONFIG: answer}), reply_to=message)
                for answer, message in zip(known, group, strict=True)
            ]
        content = group[0].content
        if kind == MessageType.TRAIN:
            replies = train_clients(self._setup, content, clients, folder=self._folder, local=True)
        else:
            replies = evaluate_clients(self._setup, content, clients, folder=self._folder)
        self._spare_memory(clients)
        return [
            answer
            for message, client, reply in zip(group, clients, replies, strict=True)
            if (answer := self._wrapped(message, client, reply)) is not None
        ]

    def _wrapped(self, message: Message, client: Client, reply: Reply) -> Message | None:
        if reply.fault == "straggle":
            return None
        if reply.fault == "drop_out":
            return failed(message, DROPPED_OUT)

        def answer(message: Message, context: Context) -> Message:
            del context
            return Message(as_records(reply, local=True), reply_to=message)

        for mod in reversed(self._mods if message.metadata.message_type == MessageType.TRAIN else []):
            answer = _around(mod, answer)
        return answer(message, client.context)

    def _spare_memory(self, clients: list[Client]) -> None:
        """Let go of what clients keep and is on disk, if it takes too much room: the longest unused first."""
        if self._folder is None:
            return
        for client in clients:
            self._contexts[client.partition] = self._contexts.pop(client.partition)
            self._kept[client.partition] = bytes_kept(client.context)
        over = sum(self._kept.values()) - _KEPT_IN_MEMORY
        for partition in list(self._contexts):
            if over <= 0:
                return
            over -= self._kept.pop(partition, 0)
            del self._contexts[partition]

    def _client(self, node: int) -> Client:
        partition = self.partitions[node]
        context = self._contexts.get(partition)
        if context is None:
            context = Context(
                run_id=_RUN,
                node_id=node,
                node_config={"partition-id": partition, "num-partitions": len(self.partitions)},
                state=RecordDict(),
                run_config={},
            )
            self._contexts[partition] = context
        return Client(partition, context)


def _around(mod: Any, inner: Any) -> Any:
    return lambda message, context: mod(message, context, inner)
