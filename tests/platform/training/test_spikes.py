"""Batches whose loss is a spike are left out of training: alike on all ranks, and after a resume."""

import math

import numpy as np
import pytest
import torch

from lossworks.data import SequenceOrder
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.specs import SpikeSpec, TelemetrySpec
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.measure.telemetry import SpikeWatch
from lossworks_testing.classification import tiny
from lossworks_testing.offered import Distillation, Recorder, offer
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_several, run_training

BATCH, STEPS, AT = 16, 26, 21  # step 21 meets the odd rows


def spec_of(file, action, **changes):
    """Return a spec on an array; nothing about it depends on the values of its rows but the losses."""
    values = tiny(
        steps=STEPS,
        batch_size=BATCH,
        data={"source": f"npz:{file}", "standardise": False},
        model={"width": 16, "dropout": 0.2},
        evaluation={"every": 30, "sequences": 100},
        checkpoint={"every": 9},
        telemetry={"spike": {"height": 12, "action": action, "most": 2}},
    )
    return {**values, **changes}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """An array of which the batch of a run's step 21 holds rows that are far off, and which rows they are."""
    file = tmp_path_factory.mktemp("odd") / "odd.npz"
    g = np.random.default_rng(0)
    x = g.standard_normal((900, 6))
    y = (x[:, 1] + x[:, 2] > 0).astype(np.int64)
    x[:, 0] = np.arange(900) / 900  # which row it is
    np.savez(file, x=x, y=y)
    task = task_of(spec := parse_train_spec(spec_of(file, "warn"))).open(spec, None)
    rows = task.order().rows((AT - 1) * BATCH, 0, 1)
    originals = (task.train.batch(rows)["inputs"][:, 0] * 900).round().int().numpy()
    x[originals[:7], 1:] *= -60
    np.savez(file, x=x, y=y)
    return file, set(rows[:7].tolist())


def weights(result):
    """Return all that a run's last checkpoint holds of model and optimiser."""
    return tensors_in(result["checkpoint"], "model.") | tensors_in(result["checkpoint"], "optimizer.")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def named(notice):
    """Return the rows that a notice names."""
    return {int(one.split(" ")[0]) for one in notice.split("largest losses: ")[1].split(";")[0].split(", ")}


def without(place, monkeypatch):
    """Have every run's order of data leave out the batch at a place."""
    plain = SequenceOrder.rows

    def rows(self, position, rank, workers):
        return plain(self, position + (BATCH if position >= place else 0), rank, workers)

    monkeypatch.setattr(SequenceOrder, "rows", rows)


def test_a_spike_that_is_skipped_is_as_if_its_batch_were_not_there(odd, tmp_path, monkeypatch):
    """Weights, optimiser and losses are equal to the bit, dropout included, and the culprits are named."""
    file, culprits = odd
    skipped = run_training(spec_of(file, "skip"), None, str(tmp_path / "skip"))
    warned = run_training(spec_of(file, "warn"), None, str(tmp_path / "warn"))
    without((AT - 1) * BATCH, monkeypatch)
    lacking = run_training(spec_of(file, "skip"), None, str(tmp_path / "lacking"))

    assert losses(skipped) == losses(lacking)
    assert_equal(weights(skipped), weights(lacking))
    assert losses(warned)[: AT - 1] == losses(skipped)[: AT - 1]
    assert losses(warned)[AT - 1] > 10 * losses(skipped)[AT - 1]
    (notice,) = skipped["notices"]
    assert notice.startswith(f"step {AT}: the loss ")
    assert notice.endswith("; its update is left out")
    assert named(notice) <= culprits
    row = dict(skipped["rows"])[AT]
    assert row["telemetry/spike"] > 12
    assert row["telemetry/left_out"] == 1
    assert skipped["status"] == "finished"


@pytest.mark.parametrize("every", [9, 100])
def test_a_rollback_goes_on_from_older_weights_behind_the_batch(odd, tmp_path, monkeypatch, every):
    """From a checkpoint, or from the start where there is none, with the data after the spike."""
    file, _ = odd
    values = spec_of(file, "rollback", checkpoint={"every": every})
    found = run_training(values, None, str(tmp_path / "found"))
    back = (AT - 1) // every * every

    steps = [step for step, _ in found["rows"]]
    assert steps == [*range(1, AT), *range(back + 1, STEPS + 1)]
    assert found["notices"][0].endswith(
        f"; going back to {f'step {back}' if back else 'the start'}, and on behind its batch"
    )
    # The same from scratch: the data between are left out, and those of the spike.
    plain = SequenceOrder.rows

    def rows(self, position, rank, workers):
        at = position if position < back * BATCH else position + (AT - back) * BATCH
        return plain(self, at, rank, workers)

    monkeypatch.setattr(SequenceOrder, "rows", rows)
    straight = run_training(values, None, str(tmp_path / "straight"))
    assert losses(found)[AT - 1 :] == losses(straight)[back:]
    assert_equal(weights(found), weights(straight))


@pytest.mark.parametrize("action", ["skip", "rollback"])
@pytest.mark.parametrize("stop", [19, 21, 23])
def test_a_resumed_run_leaves_out_the_same(odd, tmp_path, action, stop):
    """Stopped before the spike, with it or after it; the losses that it is measured against are kept."""
    file, _ = odd
    values = spec_of(file, action)
    whole = run_training(values, None, str(tmp_path / "whole"))
    run_training(values, None, str(tmp_path / "parts"), stop_after=stop)
    rest = run_training(values, None, str(tmp_path / "parts"))

    assert losses(whole)[-3:] == losses(rest)[-3:]
    assert_equal(weights(whole), weights(rest))
    state, again = (tensors_in(one["checkpoint"], "telemetry.") for one in (whole, rest))
    assert torch.equal(state["losses"].nan_to_num(), again["losses"].nan_to_num())
    assert state["left_out"].tolist() == again["left_out"].tolist()
    assert state["left_out"][1] == 1


@pytest.mark.slow
def test_two_ranks_leave_out_what_one_does(odd, tmp_path):
    """The decision is one of gathered numbers; under FSDP all that goes back is split over the ranks."""
    file, culprits = odd
    values = {action: spec_of(file, action) for action in ("skip", "rollback")}
    kinds = [("skip", "ddp"), ("rollback", "fsdp")]
    runs = [
        (
            {**values[action], "workers": 2, "sharding": {"kind": kind}, "model": {"width": 16}},
            str(tmp_path / f"{action}-{kind}"),
        )
        for action, kind in kinds
    ]
    plain = {name: {**one, "model": {"width": 16}} for name, one in values.items()}
    alone = {name: run_training(one, None, str(tmp_path / f"{name}-1")) for name, one in plain.items()}
    (tmp_path / "ranks").mkdir()
    first, second = run_ranks(2, run_several, runs, None, folder=tmp_path / "ranks")

    for (action, _), found, other in zip(kinds, first, second, strict=True):
        assert losses(found) == pytest.approx(losses(alone[action]), rel=1e-4)
        assert [step for step, _ in found["rows"]] == [step for step, _ in alone[action]["rows"]]
        assert found["metrics"]["train/loss"] == other["metrics"]["train/loss"]
        (notice,) = found["notices"]
        assert named(notice) <= culprits


def poisoned(monkeypatch, calls):
    """Have the loss of some forward passes be NaN, counted from 0."""
    plain, counted = Objective.forward, iter(range(10_000))

    def breaks(*arguments, **options):
        found = plain(*arguments, **options)
        return found * math.nan if torch.is_grad_enabled() and next(counted) in calls else found

    monkeypatch.setattr(Objective, "forward", breaks)


@pytest.mark.parametrize(("action", "loss"), [("skip", "ensloss"), ("rollback", "cross-entropy")])
def test_a_loss_that_is_not_finite_is_a_spike(tmp_path, monkeypatch, action, loss):
    """At the first step already, and it leaves what a run without its batch has, random streams too."""
    data = {"source": "wine", "classes": ["class_0", "class_1"]}
    values = tiny(telemetry={"spike": {"height": 8, "action": action}}, loss=loss, data=data)
    with monkeypatch.context() as patch:
        poisoned(patch, {0})
        found = run_training(values, None, str(tmp_path / "found"))
    plain = SequenceOrder.rows
    monkeypatch.setattr(SequenceOrder, "rows", lambda self, at, *where: plain(self, at + 30, *where))
    lacking = run_training(values, None, str(tmp_path / "lacking"))

    assert found["status"] == "finished"
    assert "step 1: the loss nan is not finite; " in found["notices"][0]
    assert losses(found) == losses(lacking)
    assert_equal(weights(found), weights(lacking))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_companions_and_methods_go_back_too(tmp_path, monkeypatch, action):
    """A moving copy, and a method whose state decides how far a step goes; back at the start where rolled."""
    offer(monkeypatch, Distillation, Recorder)
    values = tiny(
        loss=["cross-entropy", {"name": "to-teacher", "weight": 0.5}],
        roles={"teacher": {"ema": 0.8}},
        methods=["recorder"],
        telemetry={"spike": {"height": 8, "action": action}},
        checkpoint={"every": 100},
    )
    with monkeypatch.context() as patch:
        poisoned(patch, {2})
        found = run_training(values, None, str(tmp_path / "found"))
    plain = SequenceOrder.rows

    def rows(self, position, rank, workers):
        at = position + 90 if action == "rollback" else position + 30 * (position >= 60)
        return plain(self, at, rank, workers)

    monkeypatch.setattr(SequenceOrder, "rows", rows)
    lacking = run_training(values, None, str(tmp_path / "lacking"))

    assert_equal(weights(found), weights(lacking))
    for part in ("roles.", "methods."):
        kept = tensors_in(found["checkpoint"], part)
        assert kept
        assert_equal(kept, tensors_in(lacking["checkpoint"], part))


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_too_many_spikes_in_a_row_end_the_run(tmp_path, monkeypatch, action):
    """The third where two are left out; it names itself and the last good checkpoint."""
    values = tiny(telemetry={"spike": {"height": 8, "action": action, "most": 2}}, steps=30)
    poisoned(monkeypatch, set(range(4, 1000)))
    found = run_training(values, None, str(tmp_path))

    assert found["status"] == "diverged"
    at = 5 if action == "skip" else 4  # after a rollback, step 4 is the first
    assert f"step {at}: the loss nan is not finite" in found["reason"]
    assert "it is the spike number 3 in a row, and telemetry.spike.most=2 are left out" in found["reason"]
    assert found["reason"].endswith(f"the last good checkpoint is {tmp_path / 'step-00000003'}")
    assert "\n" not in found["reason"]
    assert len(found["notices"]) == 2


def test_what_is_left_out_moves_no_median():
    """Nor does it count again once a step was done; a rollback's older steps are no progress."""
    watch = SpikeWatch(SpikeSpec(height=8.0, action="rollback", most=2))
    for value in np.random.default_rng(0).normal(3.0, 0.1, 64).tolist():
        assert watch.height(value) is None
    before = watch.state()["losses"]
    height = watch.height(9.0)
    assert height is not None
    assert torch.equal(watch.state()["losses"], before)
    assert watch.height(math.inf) == math.inf
    watch.leave_out(7, height, "")
    assert watch.done(6) == {}
    assert watch.done(7) == {"telemetry/spike": height, "telemetry/left_out": 1.0}
    assert watch.done(8) == {}


def test_a_spike_is_a_number_or_a_mapping():
    """A plain number warns, as it always did."""
    assert TelemetrySpec.parse({"spike": 8}).spike == SpikeSpec(height=8.0)
    spec = parse_train_spec(tiny(telemetry={"spike": 8})).override(["telemetry.spike.action=skip"])
    assert spec.telemetry.spike == SpikeSpec(height=8.0, action="skip")
    with pytest.raises(UserError, match=r"telemetry\.spike: action=skip needs a height above which"):
        parse_train_spec(tiny()).override(["telemetry.spike.action=skip"])
