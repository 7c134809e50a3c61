"""Regressions: every loss of values learns, and is measured in the targets' unit, however it is split."""

import numpy as np
import pytest
import torch

from lossworks.catalogue.registry import create, declarations
from lossworks.data.values import load_values
from lossworks.errors import UserError
from lossworks.metrics.regression import value_metrics, value_sums
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.tasks.regression import RegressionTask
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_several, run_training

BINS = {"v_min": -4, "v_max": 4}
LOSSES = {
    "squared-error": {},
    "absolute-error": {},
    "huber": {"delta": 0.5},
    "quantile": {},
    "hl-gauss": BINS,
    "two-hot": BINS,
}


def numbers(loss="squared-error", **changes):
    """Return a small regression's spec."""
    values = tiny(task="regression", loss=loss, data={"source": "friedman:200"}, batch_size=50)
    return {**values, "evaluation": {"every": 1000}, "checkpoint": {"every": 1000}, **changes}


def chain(loss="categorical-td", **changes):
    """Return the spec of a chain's values."""
    data = {"source": "chain:2000"}
    return numbers(loss, data=data, roles={"target": {"ema": 0.9}}, **changes)


@pytest.mark.parametrize("slug", LOSSES)
def test_every_loss_of_values_learns(slug, tmp_path):
    """Friedman's function, of whose variation noise of deviation 1 leaves 4 % to no one."""
    values = numbers({"name": slug, **LOSSES[slug]}, steps=150, model={"width": 32}, batch_size=150)
    result = run_training(values, None, str(tmp_path))

    assert result["status"] == "finished"
    assert result["metrics"]["eval/r2"] > 0.5
    assert 1 < result["metrics"]["eval/rmse"] < 4
    assert losses(result)[-1] < losses(result)[0]


def test_every_loss_of_values_is_tried():
    """But for the one of next states, which needs a chain."""
    known = {slug for slug, entry in declarations("losses").items() if entry.kind == "value"}

    assert known == {*LOSSES, "categorical-td"}


@pytest.mark.parametrize("slug", LOSSES)
def test_yardsticks_are_of_decoded_values_in_their_own_unit(slug):
    """However the head says them, and whatever was trained on; unknown targets count for nothing."""
    spec = parse_train_spec(numbers({"name": slug, **LOSSES[slug]}))
    task = task_of(spec).open(spec, None)
    task.held_out.labels[3] = torch.nan
    batch = task.held_out.batch(np.arange(len(task.held_out)))
    outputs = task.build_model().outputs(batch["inputs"])
    found = task.evaluation(task.measured(outputs, batch)).metrics()

    plain = load_values(spec.data.model_copy(update={"standardise_targets": False}), spec.seed)
    plain.held_out.labels[3] = torch.nan
    scale = load_values(spec.data, spec.seed)
    loss = create(slug, **LOSSES[slug])
    decode = getattr(loss, "decode", None)
    own = decode(outputs.logits) * scale.deviation + scale.mean
    expected = value_metrics(value_sums(own, plain.held_out.labels))
    for name, value in expected.items():
        assert found[f"eval/{name}"] == pytest.approx(value, rel=1e-5)
    assert found["eval/loss"] == pytest.approx(loss(outputs.logits, batch["targets"]).item(), rel=1e-5)
    assert task.counts(batch) == (49.0, 0.0)


def test_outliers_pull_at_squares_and_not_at_a_huber_loss(tmp_path):
    """A tenth of the training targets is ten deviations away; held-out ones are as they came."""
    found = {}
    for loss in ("squared-error", {"name": "huber", "delta": 0.3}):
        data = {"source": "friedman:400", "outliers": 0.1}
        values = numbers(loss, steps=100, data=data, model={"width": 32}, batch_size=100)
        found[str(loss)] = run_training(values, None, str(tmp_path / str(len(found))))["metrics"]["eval/mae"]
    squares, huber = found.values()

    assert huber < 0.8 * squares


def test_targets_may_be_learnt_as_they_are(tmp_path):
    """Without standardisation the errors are the same numbers, and the first predictions near 0."""
    data = {"source": "friedman:200", "standardise_targets": False}
    result = run_training(numbers(steps=3, data=data, evaluation={"every": 3}), None, str(tmp_path))

    assert losses(result)[0] > 100  # the mean square of targets around 14
    assert result["metrics"]["eval/loss"] == pytest.approx(result["metrics"]["eval/rmse"] ** 2, rel=1e-4)


@pytest.mark.parametrize("loss", ["categorical-td", "squared-error"])
def test_values_approach_the_true_ones(loss, tmp_path):
    """Of a chain's states, by distributions and by plain values, from rewards and the next values alone."""
    values = chain(loss, steps=250, batch_size=256, model={"width": 32})
    values |= {"data": {"source": "chain:20000"}, "roles": {"target": {"ema": 0.8}}}
    values |= {"optimizer": {"lr": 0.01, "weight_decay": 0}, "evaluation": {"every": 50}}
    result = run_training(values, None, str(tmp_path))
    curve = [row["eval/rmse"] for _, row in result["rows"] if "eval/rmse" in row]

    assert curve[-1] < 0.6 * curve[0]
    assert result["metrics"]["eval/r2"] > 0.8


def test_without_a_future_it_is_two_hot(tmp_path):
    """At γ = 0 only the reward counts, whatever the target network says."""
    data = {"source": "chain:500", "discount": 0.0}
    td, plain = (
        run_training({**chain(loss), "data": data}, None, str(tmp_path / loss))
        for loss in ("categorical-td", "two-hot")
    )

    assert losses(td) == pytest.approx(losses(plain), rel=1e-5)
    for name in ("eval/loss", "eval/rmse", "train/grad_norm"):
        assert td["metrics"][name] == pytest.approx(plain["metrics"][name], rel=1e-4)


@pytest.mark.parametrize("loss", ["categorical-td", "squared-error"])
def test_telemetry_sees_the_loss_that_is_trained(loss, tmp_path):
    """What the target network says of the next states is in it: of one transition it is the step's loss."""
    values = chain(loss, batch_size=1, telemetry={"every": 1})
    result = run_training(values, None, str(tmp_path))

    for _, row in result["rows"]:
        assert row["telemetry/loss_max"] == pytest.approx(row["train/loss"], rel=1e-5)


def test_a_bootstrapped_target_is_the_reward_and_the_discounted_next_value():
    """r + γ·v(s′) by the companion; where the reward isn't known nothing is."""
    spec = parse_train_spec(chain("squared-error"))
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    batch = dict(task.train.batch(np.arange(5)))
    batch["targets"][2] = torch.nan
    asked = []

    def companions(given, name):
        asked.append(name)
        return {"target": model.outputs(given[name])}

    found = task.completed(batch, companions)["targets"]
    expected = batch["targets"] + 0.9 * model.logits(batch["next_inputs"])[:, 0]
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert asked == ["next_inputs"]


def test_ranks_and_micro_batches_give_what_one_process_gives(tmp_path):
    """Of a chain with its target network, and of bags, which stay whole."""
    bags = numbers("aggregate-interpolation", data={"source": "friedman:200", "bag_size": 4}, batch_size=20)
    runs = [({**chain(steps=4), "batch_size": 30}, "chain"), ({**bags, "steps": 4}, "bags")]
    alone = run_several([(values, str(tmp_path / name)) for values, name in runs], None)
    split = {"workers": 2, "sharding": "ddp", "micro_batch_size": 4}
    two = run_ranks(
        2,
        run_several,
        [({**values, **split}, str(tmp_path / f"{name}-two")) for values, name in runs],
        None,
        folder=tmp_path,
    )[0]

    for one, both in zip(alone, two, strict=True):
        assert losses(both) == pytest.approx(losses(one), rel=1e-4)
        for name in ("eval/loss", "eval/rmse"):
            assert both["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (chain() | {"roles": {}}, "a companion gives: set roles.target.ema=0.99"),
        (numbers("categorical-td"), "is for states: set data.source=chain:N and roles.target.ema"),
        (numbers("aggregate-interpolation"), "aggregate-interpolation is for bags: set data.bag_size"),
        (
            numbers("cross-entropy"),
            "cross-entropy trains task=classification or cross-tokenizer or language-model",
        ),
        (numbers(data={"bag_size": 3}, batch_size=20), "batch_size=20 must be a multiple of data.bag_size=3"),
        (
            chain() | {"data": {"source": "chain:50", "bag_size": 5}},
            "transitions of chain:50 come in no bags",
        ),
        (numbers(activation_checkpointing=True), "activation_checkpointing=true is for language models"),
        (numbers({"name": "hl-gauss", "v_min": 3, "v_max": 1}), "v_min=3 must be below v_max=1"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    """In words, with what would be right."""
    with pytest.raises(UserError) as refused:
        RegressionTask.prepare(parse_train_spec(values))
    assert message in str(refused.value)


def test_terms_of_a_sum_need_one_head():
    """Bins and plain values have heads of different widths."""
    spec = parse_train_spec(numbers(["squared-error", {"name": "hl-gauss", **BINS}]))
    with pytest.raises(UserError, match=r"loss: terms of a sum need one head; these need \[1, 51\] outputs"):
        RegressionTask.prepare(spec)
