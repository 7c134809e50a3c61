"""Strategies over apps of others, and clients under strategies of others: honoured or refused."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict

from lossworks.cohort import plan_batches
from lossworks.errors import RunError, UserError
from lossworks_federated.flower_private import failed, identify, name_message
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.catalogue import parts_told, strategy

SMALL = {"kind": "federation", "split": {"clients": 4}, "rounds": 1}


@pytest.fixture(autouse=True)
def _in_a_run():
    """Messages name the run that they are of."""
    identify(1)


class Strangers:
    """A grid whose nodes run an app that answers no question."""

    def get_node_ids(self):
        return [30, 10, 20]

    def send_and_receive(self, messages, timeout=None):
        del timeout
        for message in messages:
            name_message(message, str(message.metadata.dst_node_id))
        return [failed(message, "no query handler") for message in messages]


def test_a_part_in_clients_needs_clients_that_have_it():
    """FedLEx over another app would be FedAvg."""
    with pytest.raises(RunError, match=r"3 nodes run another ClientApp .* undone what fedlex does"):
        strategy("fedlex")().nodes(Strangers())
    assert strategy("fedavg")().nodes(Strangers()) == [(0, 10), (1, 20), (2, 30)]


@pytest.mark.parametrize(
    ("config", "slugs", "mu"),
    [
        ({"server-round": 1}, [], None),
        ({"server-round": 1, "proximal-mu": 50.0}, ["fedprox"], 50.0),
        ({"parts": '[{"name": "fedprox", "mu": 0.5}]', "proximal-mu": 50.0}, ["fedprox"], 0.5),
        ({"parts": '[{"name": "fedlex"}]', "proximal-mu": 2.0}, ["fedlex", "fedprox"], 2.0),
        ({"clipping_norm": 1.0, "task": "{}"}, [], None),
    ],
)
def test_what_flower_s_strategies_ask_of_clients_is_done(config, slugs, mu):
    """The penalty of its FedProx, with its own strength."""
    parts = parts_told(config)
    assert [part.slug for part in parts] == slugs
    if mu is not None:
        assert parts[-1].settings.mu == mu


def test_what_a_client_does_not_know_is_refused():
    with pytest.raises(RunError, match=r"the instruction holds lr=0.1, which a client of Lossworks does not"):
        parts_told({"server-round": 1, "lr": 0.1})


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"nan_clients": [99]}, "faults.nan_clients: there is no client 99, of 0 to 3"),
        ({"sign_flip_clients": [-1]}, "faults.sign_flip_clients: there is no client -1"),
        ({"drop_out": 0.8, "nan": 0.8}, "drop_out=0.8, nan=0.8 add up to 1.6; a reply has one fault at most"),
    ],
)
def test_faults_that_nobody_can_have_are_refused(faults, message):
    with pytest.raises(UserError, match=message):
        FederationSpec.parse({**SMALL, "faults": faults})


def test_a_batch_takes_no_more_room_than_there_are_examples():
    """Whatever size is asked for: the same steps as with all of the largest client's examples."""
    rows = [torch.arange(3).numpy(), torch.arange(3, 10).numpy()]
    seeds = [(0, 1, 0), (0, 1, 1)]
    large = plan_batches(rows, batch_size=2**20, epochs=2, seeds=seeds)
    exact = plan_batches(rows, batch_size=7, epochs=2, seeds=seeds)

    assert large.rows.shape == (2, 2, 7)
    for one, other in zip(
        (large.rows, large.counts, large.steps), (exact.rows, exact.counts, exact.steps), strict=True
    ):
        assert torch.equal(one, other)


def test_messages_carry_what_a_quick_start_app_reads():
    """Model and configuration under Flower's usual names."""
    own = strategy("fedavg")()
    arrays = ArrayRecord({"w": torch.zeros(2)})
    (first, *_) = own.configure_train(1, arrays, ConfigRecord({}), Strangers())

    assert first.metadata.message_type == MessageType.TRAIN
    assert isinstance(first.content, RecordDict)
    assert set(first.content.keys()) >= {"arrays", "config"}
