"""The ClientApp: the same in Flower's simulation and on a real federation's SuperNodes."""

import json
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lossworks.errors import RunError
from lossworks_federated.client.client_work import Client, Reply, train_clients
from lossworks_federated.client.personalise import own_tests
from lossworks_federated.nodes.own_data import FACTS, SUMS, facts_of, own_setup, sums_of
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
    *,
    reads_paths: bool = False,
) -> ClientApp:
    """Return the app; what it is to do comes with each message.

    Args:
        state_folder: Where clients keep things beyond the end of their process; a node's own configuration
            ``state-folder`` comes first.
        privacy: Which of Flower's mods it has.
        deadline_s: What a client that is made to straggle outlasts.
        task: What it does where the instruction names no task, as those of Flower's own strategies.
        reads_paths: Whether it reads files that an instruction names, as in a simulation on the machine that
            has them. A deployed node reads those that its own configuration names as ``data``, and no others.
    """
    app = ClientApp(mods=client_mods(privacy or PrivacySpec()))

    def configured(message: Message, context: Context) -> tuple[SharedSetup, Client, Path | None]:
        told: Any = message.content[CONFIG]
        named = context.node_config.get("state-folder")
        folder = Path(str(named)) if named else state_folder
        known = _task(told, task)
        partition = partition_of(context)
        source = _source(context, known, reads_paths=reads_paths)
        if source is None:
            setup = setup_of(known.model_dump_json())
        else:
            setup = own_setup(known.model_dump_json(), str(told["learnt"]), source, partition)
        return setup, Client(partition, context), folder

    @app.query()
    def _query(message: Message, context: Context) -> Message:
        answer = ConfigRecord({"partition-id": partition_of(context)})
        return Message(RecordDict({CONFIG: answer}), reply_to=message)

    @app.query(FACTS)
    def _facts(message: Message, context: Context) -> Message:
        told: Any = message.content[CONFIG]
        known = _task(told, task)
        found = facts_of(known, _required(_source(context, known)))
        return Message(RecordDict({CONFIG: ConfigRecord({FACTS: json.dumps(found)})}), reply_to=message)

    @app.query(SUMS)
    def _sums(message: Message, context: Context) -> Message:
        told: Any = message.content[CONFIG]
        known = _task(told, task)
        found = sums_of(known, _required(_source(context, known)), json.loads(str(told["learnt"])))
        record = ArrayRecord({name: Array(values) for name, values in found.items()})
        return Message(RecordDict({SUMS: record}), reply_to=message)

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
    """Return the partition that a node was started with.

    Raises:
        RunError: It was started without.
    """
    if "partition-id" not in context.node_config:
        raise RunError(
            "the node's configuration has no partition-id: start it with --node-config partition-id=…"
        )
    return int(context.node_config["partition-id"])


def _task(told: Mapping[str, Any], usual: TaskSpec | None) -> TaskSpec:
    """Return the task that an instruction names, or else the app's own."""
    if told.get("task"):
        return _read_task(str(told["task"]))
    if usual is None:
        raise RunError(
            "the instruction names no task, as those of Flower's own strategies: make the app with "
            "client_app(task=...)"
        )
    return usual


@lru_cache(maxsize=4)
def _read_task(text: str) -> TaskSpec:
    return TaskSpec.model_validate_json(text)


def _source(context: Context, task: TaskSpec, *, reads_paths: bool = False) -> str | None:
    """Return the source that a node's own configuration names; None where the task's is read.

    Raises:
        RunError: The instruction names a file, or data where the node has its own, or the node has none.
    """
    own = context.node_config.get("data")
    if task.split.at_nodes:
        if not own:
            raise RunError(
                "the node's configuration names no data: start it with --node-config 'data=\"csv:…\"'"
            )
        return str(own)
    if own:
        raise RunError(
            f"the node's configuration names data={own}, which only tasks of split.kind=nodes train on; this "
            f"one is of split.kind={task.split.kind}"
        )
    named = task.files_named()
    if named and not reads_paths:
        raise RunError(
            f"the instruction names {named[0]}: a node reads only what its own configuration names as data, "
            "and takes tasks of split.kind=nodes for that"
        )
    return None


def _required(source: str | None) -> str:
    if source is None:
        raise RunError("the instruction asks what the node has, and is not of split.kind=nodes")
    return source


def as_records(reply: Reply, *, local: bool = False) -> RecordDict:
    """Return a reply as Flower's records; see :func:`lossworks_federated.records.array_record`."""
    content = RecordDict()
    for name, member in reply.arrays.items():
        content[name] = array_record(member, local=local)
    content[METRICS] = MetricRecord(reply.metrics)  # type: ignore[arg-type]
    return content
