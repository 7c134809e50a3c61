"""What a task declares as its yardsticks is measured by its trainings."""

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.trainables import OWN_VALUES, trainable
from lossworks_testing.classification import tiny
from lossworks_testing.training import prepared, run_training, tiny_spec


def declared(task, values):
    kind = trainable(task)
    return set(kind.yardsticks(kind.parse(values, "spec")))


def test_those_of_classifiers_are_reported(tmp_path):
    last = run_training(tiny(), None, str(tmp_path / "run"))["rows"][-1][1]

    assert declared("classification", tiny()) <= set(last)


def test_those_of_language_models_are_reported(tmp_path):
    spec = tiny_spec(write_text(tmp_path / "text.txt", words=2000))
    values = spec.model_dump(mode="json")
    last = run_training(values, str(prepared(spec).folder), str(tmp_path / "run"))["rows"][-1][1]

    assert declared("language-model", values) <= set(last)


def test_those_of_federations_are_reported(tmp_path):
    values = {
        "strategies": ["fedavg"],
        "rounds": 2,
        "data": {"source": "wine"},
        "split": {"clients": 3},
        "model": {"width": 4, "layers": 1},
        "local": {"epochs": 1},
        "measure": {"every": 2},
    }
    kind, rows = trainable("federation"), []
    kind.train(
        kind.parse(values, "spec"), tmp_path / "run", lambda step, metrics: rows.append((step, metrics))
    )

    assert rows[-1][0] == 2
    assert declared("federation", values) <= set(rows[-1][1])


@pytest.mark.parametrize("task", ["classification", "language-model", "federation"])
def test_every_task_has_yardsticks_besides_the_losss_own_value(task):
    values = {"strategies": ["fedavg"]} if task == "federation" else {"task": task}
    assert declared(task, values) - set(OWN_VALUES)
