"""Classifiers: which classes they tell apart, losses of one logit for two of them, and bags."""

import pytest
import torch

from lossworks.data import load_examples
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec
from lossworks.tasks import parse_train_spec
from lossworks.tasks.classification import ClassificationTask
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_several, run_training


def load(**fields):
    return load_examples(ExamplesSpec.parse(fields), 0)


def bagged(loss="aggregate-interpolation", **changes):
    """Return a spec of bags of four, of which only the shares of classes count."""
    values = tiny(loss=loss, data={"source": "wine", "bag_size": 4}, batch_size=20)
    return {**values, **changes}


def test_classes_are_kept_and_numbered_as_they_are_named():
    """Whatever their order in the source; the others' examples are gone."""
    forth, back = load(source="digits", classes=[3, 8]), load(source="digits", classes=["8", 3])

    assert forth.names == ("3", "8")
    assert back.names == ("8", "3")
    assert len(forth.train) + len(forth.held_out) == 183 + 174
    assert torch.bincount(forth.train.labels).flip(0).tolist() == torch.bincount(back.train.labels).tolist()


def test_classes_that_there_are_not_are_refused():
    """By name, with those there are; a class is named once, and there are two at least."""
    with pytest.raises(UserError, match=r"data.classes: 11 is no class; there are 0, 1, 2, 3"):
        load(source="digits", classes=[3, 11])
    with pytest.raises(UserError, match=r"data.classes=\[3, 3\]: names a class twice"):
        load(source="digits", classes=[3, "3"])
    with pytest.raises(UserError, match=r"classes="):
        load(source="digits", classes=[3])


def test_losses_of_one_logit_need_two_classes(tmp_path):
    """The message says how to have two, before anything starts, also where the source has to be read."""
    with pytest.raises(UserError, match=r"ensloss is for two classes: set data.classes=\[A, B\]"):
        parse_train_spec(tiny(loss="ensloss"))
    with pytest.raises(UserError, match=r"set data.classes=\[A, B\]"):
        parse_train_spec(tiny(loss="ensloss", data={"source": "digits", "classes": [1, 2, 3]}))
    rows = "\n".join(f"{number},{'abc'[number % 3]}" for number in range(30))
    (tmp_path / "a.csv").write_text(f"x,label\n{rows}\n")
    data = {"source": f"csv:{tmp_path}/a.csv"}
    with pytest.raises(UserError, match=r"loss.name=ensloss is for two classes, and there are a, b, c: set"):
        ClassificationTask.prepare(parse_train_spec(tiny(loss="ensloss", data=data)))
    ClassificationTask.prepare(parse_train_spec(tiny(loss="ensloss", data={**data, "classes": ["c", "a"]})))


def test_a_loss_of_one_logit_learns(tmp_path):
    """From losses that are drawn anew at every step; held-out ones are logistic, and so cross-entropy."""
    values = tiny(
        loss="ensloss", data={"source": "digits", "classes": [3, 8]}, steps=60, checkpoint={"every": 60}
    )
    result = run_training(values, None, str(tmp_path))

    assert result["metrics"]["eval/accuracy"] > 0.95
    assert result["metrics"]["eval/loss"] > 0


def test_losses_of_bags_need_bags():
    """The message says so; batches and micro-batches hold whole ones."""
    with pytest.raises(UserError, match=r"aggregate-interpolation is for bags: set data.bag_size"):
        parse_train_spec(tiny(loss="aggregate-interpolation"))
    with pytest.raises(UserError, match=r"batch_size=18 must be a multiple of data.bag_size=4"):
        parse_train_spec(bagged(batch_size=18))
    with pytest.raises(UserError, match=r"micro_batch_size=6 must be a multiple of data.bag_size=4"):
        parse_train_spec(bagged(micro_batch_size=6))
    with pytest.raises(UserError, match=r"data.bag_size=500: there are only 133 training examples"):
        load(source="wine", bag_size=500)


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_classes_are_learnt_from_shares_in_bags(rho, tmp_path):
    """By the loss of bags and by that of instances: far better than the share of the largest class, 40 %."""
    values = bagged({"name": "aggregate-interpolation", "rho": rho}, steps=100, checkpoint={"every": 100})
    result = run_training(values, None, str(tmp_path))

    assert result["metrics"]["eval/accuracy"] > 0.85


def test_bags_on_two_ranks_give_what_one_process_gives(tmp_path):
    """Three bags in micro-batches of one on two ranks, one of which has a bag more."""
    values = bagged(batch_size=12)
    one = run_training(values, None, str(tmp_path / "one"))
    split = {**values, "workers": 2, "micro_batch_size": 4}
    runs = [({**split, "sharding": kind}, str(tmp_path / kind)) for kind in ("ddp", "fsdp")]

    for two in run_ranks(2, run_several, runs, None, folder=tmp_path)[0]:
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        for name in ("eval/loss", "eval/accuracy"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)
