"""The ClientApp: the same in Flower's simulation and on a real federation's SuperNodes."""

import time
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lossworks.errors import RunError
from lossworks_federated.client.client_work import Client, Reply, train_clients
from lossworks_federated.client.personalise import own_tests
from lossworks_federated.privacy import client_mods
from lossworks_federated.records import CONFIG, METRICS, array_record
from lossworks_federated.shared_setup import SharedSetup, setup_of
from lossworks_federated.spec_parts import PrivacySpec, TaskSpec

DROPPED_OUT = "fault: dropped out"


def client_app(
    state_folder: Path | None = None,
    privacy: PrivacySpec | None = None,
    deadline_s: float = 0.0,
    task: TaskSpec | None = None,
) -> ClientApp:
    """Return the app; what it is to do comes with each message.

    Args:
        state_folder: Where clients keep things beyond the end of their process; a node's own configuration
            ``state-folder`` comes first.
        privacy: Which of Flower's mods it has.
        deadline_s: What a client that is made to straggle outlasts.
        task: What it does where the instruction names no task, as those of Flower's own strategies.
    """
    app = ClientApp(mods=client_mods(privacy or PrivacySpec()))

    def configured(message: Message, context: Context) -> tuple[SharedSetup, Client, Path | None]:
        told: Any = message.content[CONFIG]
        named = context.node_config.get("state-folder")
        folder = Path(str(named)) if named else state_folder
        known = told.get("task") or (task and task.model_dump_json())
        if not known:
            raise RunError(
                "the instruction names no task, as those of Flower's own strategies: make the app with "
                "client_app(task=...)"
            )
        return setup_of(str(known)), Client(partition_of(context), context), folder

    @app.query()
    def _query(message: Message, context: Context) -> Message:
        answer = ConfigRecord({"partition-id": partition_of(context)})
        return Message(RecordDict({CONFIG: answer}), reply_to=message)

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        setup, client, folder = configured(message, context)
        reply = train_clients(setup, message.content, [client], folder=folder)[0]
        if reply.fault == "drop_out":
            raise RunError(DROPPED_OUT)
        if reply.fault == "straggle":
            time.sleep(deadline_s + 1)
        return Message(as_records(reply), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        setup, client, folder = configured(message, context)
        reply = own_tests(setup, message.content, [client], folder=folder)[0]
        return Message(as_records(reply), reply_to=message)

    return app


def partition_of(context: Context) -> int:
    """Return the partition that a node was started with."""
    return int(context.node_config["partition-id"])


def as_records(reply: Reply, *, local: bool = False) -> RecordDict:
    """Return a reply as Flower's records; see :func:`lossworks_federated.records.array_record`."""
    content = RecordDict()
    for name, member in reply.arrays.items():
        content[name] = array_record(member, local=local)
    content[METRICS] = MetricRecord(reply.metrics)  # type: ignore[arg-type]
    return content
