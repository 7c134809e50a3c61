"""Clients' tests of the global model, and of what they make of it by training it on their own examples."""

from collections.abc import Sequence
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from lossworks.cohort import Member, member_of
from lossworks_federated.client.client_work import (
    Client,
    Reply,
    evaluate_clients,
    own_parameters,
    train_clients,
)
from lossworks_federated.records import CONFIG, MODEL, array_record, model_from
from lossworks_federated.shared_setup import SharedSetup


def own_tests(
    setup: SharedSetup, content: RecordDict, clients: Sequence[Client], *, folder: Path | None = None
) -> list[Reply]:
    """Test the model that clients are sent on their own test examples; see ``train_clients``.

    Where the instruction holds ``personalise``, each client also trains that model for so many epochs, as
    the local optimiser does and without what methods add, and tests it again: its reply then has the same
    figures under ``personal-NAME``, too.
    """
    replies = evaluate_clients(setup, content, clients, folder=folder)
    config = content.config_records[CONFIG]
    if "personalise" not in config or setup.task.pooled:  # where one client has all, others have none
        return replies
    epochs = int(config["personalise"])  # type: ignore[arg-type]
    for client, reply, own in zip(
        clients, replies, _tuned(setup, content, clients, epochs, folder), strict=True
    ):
        found = evaluate_clients(setup, _instruction(content, own, parts="[]"), [client])[0].metrics
        reply.metrics.update(
            {f"personal-{name}": one for name, one in found.items() if name != "num-examples"}
        )
    return replies


def _tuned(
    setup: SharedSetup, content: RecordDict, clients: Sequence[Client], epochs: int, folder: Path | None
) -> list[Member]:
    """Return each client's model after its training."""
    origin = model_from(content, setup.initial)
    # Of no round, so that no fault is put in and nothing is kept.
    told: dict[str, str | int] = {"parts": "[]", "server-round": 0, "epochs": epochs}
    own = own_parameters(setup, content, clients, folder=folder)
    if not own:
        replies = train_clients(setup, _instruction(content, origin, **told), clients)
        return [reply.arrays[MODEL] for reply in replies]
    found = []
    for index, client in enumerate(clients):
        start = {**origin, **member_of(own, index)}
        found.append(train_clients(setup, _instruction(content, start, **told), [client])[0].arrays[MODEL])
    return found


def _instruction(content: RecordDict, model: Member, **told: str | int) -> RecordDict:
    """Return an instruction with another model and other settings."""
    config = {name: value for name, value in content.config_records[CONFIG].items() if name != "personalise"}
    return RecordDict({MODEL: array_record(model, local=True), CONFIG: ConfigRecord({**config, **told})})
