"""``engine=sequential``: any ClientApp in this process, one client after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from flwr.app import Context, Message

from lossworks.errors import LossworksError
from lossworks_federated.engines.in_process_grid import InProcessGrid
from lossworks_federated.flower_private import failed


class SequentialGrid(InProcessGrid):
    """Calls a ClientApp once a message, in the order of the messages, each client with its own context.

    Args:
        app: The ClientApp.
        clients: How many nodes there are.
        node_configs: Of each client, what its node's configuration holds besides its partition.
        deadline_s: Seconds after which a client's reply is left out; None for never.
    """

    def __init__(
        self,
        app: Callable[[Message, Context], Message],
        clients: int,
        *,
        node_configs: Sequence[Mapping[str, Any]] | None = None,
        deadline_s: float | None = None,
    ) -> None:
        super().__init__(clients, node_configs)
        self._app, self._deadline_s = app, deadline_s

    def answers(self, messages: Sequence[Message]) -> list[Message]:
        """Return the replies to messages; an app's exception is an error reply, as in Flower's engines."""
        found = (self._answer(message) for message in messages)
        return [reply for reply in found if reply is not None]

    def _answer(self, message: Message) -> Message | None:
        instruction = message.content
        # All clients share one instruction, and an app may write into what it is given.
        message.content = deepcopy(instruction)
        began = time.monotonic()
        try:
            reply = self._app(message, self.context_of(message.metadata.dst_node_id - 1))
        except LossworksError as error:
            reply = failed(message, str(error))
        except Exception as error:  # noqa: BLE001 - anybody's code, which is to stop no other client
            reply = failed(message, f"{type(error).__name__}: {error}")
        finally:
            message.content = instruction
        late = self._deadline_s is not None and time.monotonic() - began > self._deadline_s
        return None if late else reply
