"""What an answer gets that looks at no input: a model must be better than that."""

import math

import pytest
import torch

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks_testing.classification import tiny
from lossworks_testing.training import tiny_spec


def simplest(values):
    spec = parse_train_spec(values)
    task = task_of(spec).open(spec, None)
    return task, task.simplest()


def targets(task):
    return [part.batch(torch.arange(len(part)).numpy())["targets"] for part in (task.train, task.held_out)]


def test_of_classes_it_is_their_shares():
    """Its accuracy is that of the commonest class, and its mean recall one of the number of classes."""
    task, found = simplest(tiny(data={"source": "wine"}))
    train, held_out = targets(task)
    shares = torch.bincount(train).double()
    commonest = int(shares.argmax())

    assert found.yardsticks["eval/accuracy"] == pytest.approx(float((held_out == commonest).double().mean()))
    assert found.yardsticks["eval/balanced_accuracy"] == pytest.approx(1 / 3)
    p = (shares + 1) / (shares + 1).sum()
    assert found.yardsticks["eval/cross_entropy"] == pytest.approx(float(-p[held_out].log().mean()), rel=1e-6)


def test_of_values_it_is_their_mean():
    """Its R² is about 0, and its error the deviation of the held-out values."""
    task, found = simplest(tiny(task="regression", loss="squared-error", data={"source": "diabetes"}))
    train, held_out = targets(task)
    error = (held_out.double() - float(train.mean())).square().mean().sqrt() * float(task.data.deviation)

    assert found.yardsticks["eval/rmse"] == pytest.approx(float(error), rel=1e-5)
    assert found.yardsticks["eval/r2"] <= 0


def test_of_labels_it_is_the_commonest():
    """Said of every example."""
    data = {"source": "topics:1000", "labels": 50}
    task, found = simplest(tiny(task="multi-label", loss="soft-top-k", data=data))
    train, held_out = targets(task)
    first = int(torch.bincount(train[train >= 0]).argmax())

    assert found.yardsticks["eval/precision_at_1"] == pytest.approx(
        float((held_out == first).any(1).double().mean())
    )


def test_of_a_text_it_is_the_tokens_shares(tmp_path):
    """Better than a uniform guess."""
    spec = tiny_spec(write_text(tmp_path / "text.txt"))
    task = task_of(spec).open(spec, None)
    found = task.simplest()

    assert 0 < found.yardsticks["eval/cross_entropy"] < math.log(task.corpus.vocab_size)
    assert found.yardsticks["eval/perplexity"] == pytest.approx(
        math.exp(found.yardsticks["eval/cross_entropy"])
    )
