"""Flower besides its documented interface: its telemetry, a run and an identity without a SuperLink, ids."""

import os

import flwr.supercore.telemetry
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "failed", "identify", "make_run", "name_message", "settle_telemetry"]


def settle_telemetry() -> None:
    """Let Flower notice FLWR_TELEMETRY_ENABLED as it is now; it reads it once, when it is imported."""
    flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED = os.getenv("FLWR_TELEMETRY_ENABLED", "1")


def identify(run: int) -> None:
    """Say which run and node this process's messages come from; inside ``flwr run`` Flower does it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, 1, 1


def make_run(run: int) -> Run:
    """Return a run that no SuperLink knows."""
    return Run.create_empty(run)


def name_message(message: Message, name: str) -> None:
    """Give a message the id that a SuperLink would give it when it is sent."""
    message.metadata.__dict__["_message_id"] = name


def failed(message: Message, reason: str) -> Message:
    """Return the reply of a client whose app raised an error."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
