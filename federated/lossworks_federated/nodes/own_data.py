"""A node's own data, which its own configuration names, and what it says of them before the first round.

F features or channels.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch

from lossworks.data.example_sources import Read, read_examples
from lossworks.data.examples import ExampleData, Examples
from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation, to_float32
from lossworks.errors import RunError, UserError
from lossworks.tasks.classification import ClassificationTask, ClassifierSpec
from lossworks_federated.shared_setup import SharedSetup, setup_with
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.splits import OwnRows, Split, own_split

FACTS, SUMS = "facts", "sums"
"""What nodes are asked: actions of query messages, and the records of their answers."""

_ALL = "the federation"
NodeSums = dict[str, np.ndarray]
"""By name, float64 (F): ``count`` of known values, their ``mean``, and the sum of ``squares`` around it."""


def facts_of(task: TaskSpec, source: str) -> dict[str, Any]:
    """Return what a node says of its data: names of classes, how columns of a table are read, a shape.

    Args:
        task: The federation's.
        source: Of the node, such as ``csv:PATH``.

    Returns:
        Plain data: ``classes``; ``columns`` and ``header`` of a table, else None, and its columns that are
        ``constant`` at this node; ``shape`` of an example.

    Raises:
        UserError: The source can't be read.
    """
    found = _read(task, source, Learnt({}))
    columns = None if found.features is None else found.features.plain()
    dropped = [] if found.features is None else list(found.features.dropped)
    constant = () if found.features is None else found.features.constant
    return {
        "classes": list(found.names),
        "columns": columns,
        "constant": [column.plain() for column in constant],
        "header": dropped + [column["name"] for column in columns or []],
        "shape": list(found.inputs.shape[1:]),
    }


def sums_of(task: TaskSpec, source: str, facts: Mapping[str, Any]) -> NodeSums:
    """Return the sums of a node's inputs from which all together have their mean and deviation.

    Squares are taken around the node's own mean, since those of large numbers would be rounded away.

    Args:
        task: The federation's.
        source: Of the node.
        facts: What all have agreed on.

    Raises:
        UserError: The source can't be read, or doesn't fit what was agreed on.
    """
    wide = _read(task, source, _agreed(facts)).inputs.astype(np.float64)
    axes = (0, *range(2, wide.ndim))
    count = np.isfinite(wide).sum(axes).astype(np.float64)
    mean = np.nansum(wide, axes) / np.maximum(count, 1)
    around = wide - mean.reshape(1, -1, *[1] * (wide.ndim - 2))
    return {"count": count, "mean": mean, "squares": np.nansum(around**2, axes)}


@lru_cache(maxsize=2)
def own_setup(task: str, facts: str, source: str, partition: int) -> SharedSetup:
    """Return what a node trains with: its own data, and the model that all have.

    Args:
        task: The federation's, as JSON.
        facts: What all have agreed on, as JSON.
        source: Of the node.
        partition: The node's; that of others is empty.

    Raises:
        UserError: The source can't be read, has too few examples, or doesn't fit what was agreed on.
    """
    told, known = TaskSpec.model_validate_json(task), json.loads(facts)
    learnt = _agreed(known)
    found = _read(told, source, learnt)
    learnt.require_shape(found.inputs.shape[1:])
    labels = learnt.numbers_of(found.names, "classes")[found.labels]
    scale = Standardisation.of_facts(known)
    if scale is None and np.isnan(found.inputs).any():
        raise UserError("data.standardise=false: cells are empty, and the mean that stands in needs true")
    x = torch.from_numpy(to_float32(scale(found.inputs) if scale else found.inputs))
    classes = tuple(map(str, learnt.fact("classes")))
    split = own_split(labels, told.split, told.seed, partition, len(classes))
    none = Examples(x[:0], torch.from_numpy(labels[:0]))
    data = ExampleData(Examples(x, torch.from_numpy(labels)), none, classes, standardisation=scale)
    return setup_with(told, _classification(told, data), split)


def server_setup(task: TaskSpec, facts: Mapping[str, Any]) -> SharedSetup:
    """Return what the server knows of such a federation: the model, and no examples."""
    shape, classes = tuple(facts["shape"]), tuple(map(str, facts["classes"]))
    none = Examples(torch.zeros(0, *shape), torch.zeros(0, dtype=torch.int64))
    data = ExampleData(none, none, classes, standardisation=Standardisation.of_facts(facts))
    nobody = OwnRows(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    nothing = Split(nobody, nobody, np.zeros((0, len(classes)), dtype=np.int64), 0)
    return setup_with(task, _classification(task, data), nothing)


def _classification(task: TaskSpec, data: ExampleData) -> ClassificationTask:
    return ClassificationTask(cast("ClassifierSpec", task.run_spec()), data=data)


def _agreed(facts: Mapping[str, Any]) -> Learnt:
    return Learnt(facts, source=_ALL)


def _read(task: TaskSpec, source: str, learnt: Learnt) -> Read:
    """Return a node's examples; of the federation's classes only, where it names them."""
    told = cast("ClassifierSpec", task.run_spec()).data
    values = {**told.model_dump(mode="json"), "source": source, "classes": None}
    found = read_examples(type(told).parse(values, source="the node's configuration"), task.seed, learnt)
    if told.classes is None:
        return found
    kept = [str(name) for name in told.classes]
    own = [number for number, name in enumerate(found.names) if name in kept]
    rows = np.isin(found.labels, own)
    if not rows.any():
        raise RunError(f"{source}: holds no example of the classes {', '.join(kept)}")
    names = tuple(found.names[number] for number in own)
    return found._replace(
        inputs=found.inputs[rows], labels=np.searchsorted(own, found.labels[rows]), names=names
    )
