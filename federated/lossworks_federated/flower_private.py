"""Flower besides its documented interface: its telemetry, a run and an identity without a SuperLink, ids."""

import os

import flwr.supercore.telemetry
from flwr.app import ArrayRecord, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "failed", "identify", "make_run", "name_message", "noisy", "settle_telemetry"]


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


def noisy(
    central: DifferentialPrivacyClientSideFixedClipping, arrays: ArrayRecord, share: float
) -> ArrayRecord:
    """Return a mean of clipped updates with the server's noise.

    Args:
        central: What knows the noise multiplier and the clipping norm.
        arrays: The mean.
        share: Largest weight that a client has in it: the noise's deviation is their product.
    """
    central.num_sampled_clients = 1 / share  # type: ignore[assignment]
    return central._add_noise_to_aggregated_arrays(arrays)


def failed(message: Message, reason: str) -> Message:
    """Return the reply of a client whose app raised an error."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
