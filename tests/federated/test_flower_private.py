"""What Lossworks uses of Flower besides its documented interface; after an upgrade, these come first."""

import io
import subprocess
import sys

import numpy as np
import pytest
from flwr.app import Message, MessageType, RecordDict
from flwr.supercore import telemetry

from lossworks_federated import flower_private


@pytest.mark.parametrize("said", ["0", "1"])
def test_telemetry_is_settled_after_the_import(said, monkeypatch):
    """Flower reads the variable once; a request is made only where it is "1"."""
    monkeypatch.setattr(telemetry, "FLWR_TELEMETRY_ENABLED", "as it was imported")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", said)
    asked = []

    def urlopen(request, **_):
        asked.append(request.full_url)
        return io.BytesIO(b"{}")

    monkeypatch.setattr(telemetry.urllib.request, "urlopen", urlopen)
    flower_private.settle_telemetry()
    telemetry.create_event(telemetry.EventType.RUN_SUPERLINK_ENTER, None)

    assert len(asked) == int(said), "flwr.supercore.telemetry decides by something else than its constant"


def test_messages_can_be_made_and_named_without_a_superlink():
    """The cohort engine answers messages in the process of the strategy."""
    code = (
        "from flwr.app import Message, MessageType, RecordDict\n"
        "from lossworks_federated import flower_private\n"
        "flower_private.identify(7)\n"
        "message = Message(RecordDict(), 3, MessageType.TRAIN)\n"
        "flower_private.name_message(message, 'first')\n"
        "print(message.metadata.run_id, message.metadata.message_id)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    assert done.stdout.split() == ["7", "first"], f"messages take run and id from elsewhere: {done.stderr}"
    assert flower_private.make_run(7).run_id == 7, "Run.create_empty makes another run"


def test_a_client_that_failed_answers_with_an_error():
    """As its SuperNode would."""
    flower_private.identify(1)
    message = Message(RecordDict(), 3, MessageType.TRAIN)
    flower_private.name_message(message, "first")
    reply = flower_private.failed(message, "why")

    assert reply.has_error()
    assert reply.error.reason == "why"
    assert reply.metadata.reply_to_message_id == "first"


def test_noise_has_the_deviation_of_the_largest_share():
    """Flower's own wrapper divides by the number of clients that were asked."""
    from flwr.app import Array, ArrayRecord
    from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedAvg

    central = DifferentialPrivacyClientSideFixedClipping(FedAvg(), 1.5, 2.0, 1)
    blurred = flower_private.noisy(central, ArrayRecord({"w": Array(np.zeros(40_000, np.float32))}), 0.25)

    assert np.std(blurred["w"].numpy()) == pytest.approx(1.5 * 2.0 * 0.25, rel=0.03)
