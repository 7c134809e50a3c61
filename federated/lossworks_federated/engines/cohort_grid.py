"""A Grid whose clients live in this process and are trained at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict

from lossworks_federated.client.client_app import DROPPED_OUT, as_records
from lossworks_federated.client.client_work import Client, Reply, train_clients
from lossworks_federated.client.personalise import own_tests
from lossworks_federated.engines.in_process_grid import InProcessGrid
from lossworks_federated.flower_private import failed
from lossworks_federated.privacy import client_mods
from lossworks_federated.records import CONFIG
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.spec_parts import PrivacySpec


class CohortGrid(InProcessGrid):
    """Hands a round's messages to the cohort engine; any Flower strategy can use it.

    Messages of one instruction are answered at once. A client that is made to straggle gives no reply, as if
    the deadline had passed.

    Args:
        setup: What clients have in common.
        state_folder: Where clients keep things beyond the end of this process; None for nowhere.
        privacy: Flower's mods around each reply.
    """

    def __init__(
        self, setup: SharedSetup, state_folder: Path | None = None, privacy: PrivacySpec | None = None
    ) -> None:
        super().__init__(setup.task.split.clients, contexts_last=state_folder is None)
        self._setup, self._folder = setup, state_folder
        self._mods = client_mods(privacy or PrivacySpec())

    def answers(self, messages: Sequence[Message]) -> list[Message]:
        """Return the replies to messages, those of one instruction made at once."""
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
            replies = own_tests(self._setup, content, clients, folder=self._folder)
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

    def _client(self, node: int) -> Client:
        partition = node - 1
        return Client(partition, self.context_of(partition))


def _around(mod: Any, inner: Any) -> Any:
    return lambda message, context: mod(message, context, inner)
