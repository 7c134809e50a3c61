"""A ClientApp of another package as a spec asks for it: configured, and with random numbers that repeat."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from lossworks_federated.apps.offered import RunValue, offered_app
from lossworks_federated.client.app_memory import keep_app, recall_app
from lossworks_federated.client.client_memory import moment_of
from lossworks_federated.records import CONFIG

_KINDS = (MessageType.TRAIN, MessageType.EVALUATE)


class PreparedApp(ClientApp):
    """Calls an offered ClientApp.

    It finds the run configuration in its context; which partition is whose is answered for it. Before each
    call, the random streams of Python, numpy and torch are seeded by seed and round of the instruction and
    the client's partition, and afterwards they are as they were, so that the same federation gives the same
    result. What the app keeps in its context is kept in the client's folder, too, for a run that goes on.

    Args:
        name: Of the app; it is imported where it is called.
        config: Run configuration.
        state_folder: Where parts of strategies keep things beyond the end of this process, unless the node's
            own configuration names a ``state-folder``.
    """

    def __init__(self, name: str, config: Mapping[str, RunValue], state_folder: Path | None = None) -> None:
        super().__init__()
        self._name, self._config, self._folder = name, dict(config), state_folder

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message."""
        if message.metadata.message_type == MessageType.QUERY:
            answer = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
            return Message(RecordDict({CONFIG: answer}), reply_to=message)
        told: Mapping[str, Any] = message.content.config_records.get(CONFIG, {})
        kind = _KINDS.index(message.metadata.message_type)
        partition = int(context.node_config["partition-id"])
        numbers = [int(told["seed"]), int(told["server-round"]), partition, kind]
        configured = self._configured(context)
        folder = configured.node_config.get("state-folder")
        moments = [
            moment_of(told, int(told["server-round"]) + later, Path(str(folder)) if folder else None)
            for later in (kind, 0)  # an evaluation comes after the training of its round
        ]
        recall_app(configured, moments[0])
        with streams_seeded(numbers):
            reply = offered_app(self._name).app(message, configured)
        keep_app(configured, moments[1])
        return reply

    def _configured(self, context: Context) -> Context:
        """Return a context with the same state; Flower refuses one whose configuration was changed."""
        folder = {} if self._folder is None else {"state-folder": str(self._folder)}
        return Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config={**folder, **context.node_config},
            state=context.state,
            run_config={**context.run_config, **self._config},
        )


@contextmanager
def streams_seeded(numbers: Sequence[int]) -> Iterator[None]:
    """Seed the global random streams of Python, numpy and torch, and leave them as they were.

    Args:
        numbers: What the seed follows from, each at least 0.
    """
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    ours, theirs, torchs = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
        torch.set_rng_state(torchs)
