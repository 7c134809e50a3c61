"""What the nodes of a federation agree on before the first round, without sending an example.

Each says which classes it has and how it reads the columns of its table; what all have together is told to
all. Then each says sums of its inputs, from which all have one mean and deviation.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from lossworks.data.example_sources import in_order
from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation
from lossworks.data.tables import Column, Features
from lossworks.errors import RunError, UserError
from lossworks.tasks.classification import ClassifierSpec
from lossworks_federated.nodes.own_data import FACTS, SUMS
from lossworks_federated.records import CONFIG
from lossworks_federated.server.screening import last_line
from lossworks_federated.spec_parts import NodesSpec, TaskSpec


def agree(grid: Grid, task: TaskSpec, nodes: NodesSpec, deadline_s: float) -> Learnt:
    """Ask all nodes and return what they have agreed on.

    Args:
        grid: The federation.
        task: What clients are told.
        nodes: What is given instead of being asked for.
        deadline_s: Seconds to wait for answers.

    Raises:
        RunError: A node didn't answer, or can't read its data.
        UserError: The nodes' data don't fit each other.
    """
    told = {"task": task.model_dump_json()}
    said = [json.loads(str(answer[CONFIG][FACTS])) for answer in _asked(grid, FACTS, told, deadline_s)]
    data = cast("ClassifierSpec", task.run_spec()).data
    facts = merged(said, data.classes)
    if data.standardise:
        facts["standardisation"] = _scale(
            grid, {**told, "learnt": json.dumps(facts)}, nodes, deadline_s
        ).plain()
        _require_features(facts)
    return Learnt(facts, source="the federation")


def merged(said: Sequence[Mapping[str, Any]], classes: Sequence[str | int] | None = None) -> dict[str, Any]:
    """Return what nodes say together: all classes, the columns that all have, one shape.

    Args:
        said: What each says; see :func:`lossworks_federated.nodes.own_data.facts_of`.
        classes: Names of the classes, if they are given.

    Raises:
        UserError: Columns, shapes or classes don't fit.
    """
    names = np.unique([name for one in said for name in one["classes"]])
    known = [str(names[at]) for at in in_order(names)] if classes is None else [str(name) for name in classes]
    if len(known) < 2:
        raise UserError(f"the nodes' data hold the class {known[0]} alone; two are the least")
    tables = {one["columns"] is not None for one in said}
    if len(tables) > 1:
        raise UserError("some nodes' data are tables, and some are not")
    columns = None
    shapes = {tuple(one["shape"]) for one in said}
    if tables == {True}:
        features = Features(tuple(_columns(said)))
        columns = features.plain()
        shapes = {(sum(len(column.features) for column in features.columns),)}
    if len(shapes) > 1:
        raise UserError(
            f"the nodes' examples have different shapes: {' and '.join(map(str, sorted(shapes)))}"
        )
    return {"classes": known, "shape": list(shapes.pop()), "columns": columns, "standardisation": None}


def standardisation_of(sums: Sequence[Mapping[str, np.ndarray]]) -> Standardisation:
    """Return mean and deviation of all nodes' inputs from their sums, as if they were pooled.

    With counts n_i, means μ_i and squares q_i = Σ (x − μ_i)², the mean is μ = Σ n_i μ_i/Σ n_i, and the
    variance is Σ (q_i + n_i (μ_i − μ)²)/Σ n_i. A constant feature has the deviation 1.
    """
    counts, means, squares = (np.stack([one[name] for one in sums]) for name in ("count", "mean", "squares"))
    total = np.maximum(counts.sum(0), 1)
    mean = (counts * means).sum(0) / total
    around = squares + counts * (means - mean) ** 2
    alike = (squares == 0).all(0) & (np.ptp(np.where(counts > 0, means, mean), axis=0) == 0)
    return Standardisation(mean, np.where(alike, 1.0, np.sqrt(around.sum(0) / total)))


def _scale(grid: Grid, told: dict[str, str], nodes: NodesSpec, deadline_s: float) -> Standardisation:
    if nodes.mean is not None and nodes.deviation is not None:
        return Standardisation(np.array(nodes.mean), np.array(nodes.deviation))
    answers = _asked(grid, SUMS, told, deadline_s)
    records = [answer.array_records[SUMS] for answer in answers]
    found = [{name: array.numpy() for name, array in record.items()} for record in records]
    scale = standardisation_of(found)
    if not np.isfinite(scale.mean).all():
        raise UserError("the nodes' data hold numbers whose mean or deviation is not finite")
    return scale


def _require_features(facts: Mapping[str, Any]) -> None:
    """Refuse a given scale of another number of features than the nodes' data have."""
    given, have = len(facts["standardisation"]["mean"]), facts["shape"][0]
    if given != have:
        raise UserError(f"nodes.mean has {given} numbers; the nodes' data have {have} features or channels")


def _columns(said: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Return the columns that any node takes for a feature, with the categories of all.

    One that is the same in all rows of every node is a feature if it differs between nodes.
    """
    found: dict[str, Column] = {}
    for one in said:
        for values in (*one["columns"], *one["constant"]):
            column = Column.of_plain(values)
            known = found.get(column.name, column)
            if known.kind != column.kind:
                raise UserError(
                    f"column {column.name!r} is a {known.kind} at one node and a {column.kind} at another; "
                    f"say what it is with data.columns.{column.name}=KIND, or leave it out with drop"
                )
            both = tuple(sorted({*known.categories, *column.categories}))
            comma = known.comma if known.comma is not None else column.comma
            found[column.name] = Column(column.name, column.kind, both, known.gaps or column.gaps, comma)
    taken = {values["name"] for one in said for values in one["columns"]}
    found = {name: column for name, column in found.items() if name in taken or len(column.categories) > 1}
    for one in said:
        missing = [name for name in found if name not in one["header"]]
        if missing:
            raise UserError(
                f"a node's table has no column {missing[0]!r}, which another's has; leave it out with "
                f"data.columns.{missing[0]}=drop"
            )
    return list(found.values())


def _asked(grid: Grid, action: str, told: Mapping[str, str], deadline_s: float) -> list[RecordDict]:
    """Return all nodes' answers to a question, in the order of their ids.

    Raises:
        RunError: One of them has none.
    """
    content = RecordDict({CONFIG: ConfigRecord(dict(told))})
    nodes = sorted(grid.get_node_ids())
    messages = [Message(content, node, f"{MessageType.QUERY}.{action}") for node in nodes]
    replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(messages, timeout=deadline_s)}
    for node in nodes:
        reply = replies.get(node)
        if reply is None:
            raise RunError(f"node {node} did not answer within {deadline_s:g} s what it has")
        if reply.has_error():
            raise RunError(f"node {node} can't say what it has: {last_line(reply.error.reason)}")
    return [replies[node].content for node in nodes]
