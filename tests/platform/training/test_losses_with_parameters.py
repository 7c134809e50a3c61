"""Losses that are part of what is trained: their parameters, their state, and sums before a nonlinearity."""

from pathlib import Path

import pytest
import torch

from lossworks.adapters.torch_private import pretended_ranks
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import build_classifier
from lossworks.models.folders import WEIGHTS, read_tensors
from lossworks.specs import ClassifierModelSpec, LossSpec, OptimizerSpec
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.optimizer import OBJECTIVE, build_optimizers
from lossworks.training.weights.export import export_run
from lossworks_testing.classification import tiny
from lossworks_testing.offered import Uncertainty, offer, run_offered
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_training

DICE = tiny(batch_size=21, loss=["batch-dice", {"name": "cross-entropy", "weight": 0.1}])
LEARNT = tiny(batch_size=21, loss=["uncertainty", {"name": "ldr", "weight": 0.5}])


@pytest.fixture(autouse=True)
def _offered(monkeypatch):
    offer(monkeypatch, Uncertainty)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One process at once and in micro-batches, and two ranks as replicas and with split parameters."""
    folder = tmp_path_factory.mktemp("runs")
    alone, split = [], []
    for name, values in (("dice", DICE), ("learnt", LEARNT)):
        alone += [(values, f"{name}-whole"), ({**values, "micro_batch_size": 4}, f"{name}-micro")]
        for kind in ("ddp", "fsdp"):
            two = {**values, "workers": 2, "sharding": {"kind": kind}, "micro_batch_size": 4}
            split.append((two, f"{name}-{kind}"))
    found = {}
    for some, run in (
        (alone, run_offered),
        (split, lambda given: run_ranks(2, run_offered, given, folder=folder)[0]),
    ):
        results = run([(values, str(folder / name)) for values, name in some])
        found |= {name: result for (_, name), result in zip(some, results, strict=True)}
    return found


@pytest.mark.parametrize("how", ["micro", "ddp", "fsdp"])
@pytest.mark.parametrize("name", ["dice", "learnt"])
def test_a_batch_may_be_split(runs, name, how):
    """Nonlinear functions of the batch's sums, and learnt parameters, are what they are in one piece."""
    whole, parts = runs[f"{name}-whole"], runs[f"{name}-{how}"]

    assert whole["status"] == parts["status"] == "finished"
    for (_, expected), (_, actual) in zip(whole["rows"], parts["rows"], strict=True):
        for figure in ("train/loss", "train/grad_norm", "eval/loss", "eval/brier"):
            if figure in expected:
                assert actual[figure] == pytest.approx(expected[figure], rel=2e-4), figure


def last(result):
    """Return what the newest checkpoint holds of the losses."""
    return tensors_in(Path(result["checkpoint"]), f"model.{OBJECTIVE}.")


@pytest.mark.parametrize("how", ["whole", "micro", "ddp", "fsdp"])
def test_parameters_of_a_loss_are_trained_and_kept(runs, how):
    """Equal in the checkpoints of however the run was split; without a gradient nothing moves them."""
    own, expected = last(runs[f"learnt-{how}"]), last(runs["learnt-whole"])

    assert {"losses.0.s", "losses.0.matrix", "losses.0.calls"} == set(own)
    assert own["losses.0.s"] != 0
    torch.testing.assert_close(own["losses.0.s"], expected["losses.0.s"], rtol=1e-4, atol=1e-6)
    assert torch.equal(own["losses.0.matrix"], torch.ones(2, 2))


def test_a_learnt_weight_ends_where_it_is_least(tmp_path):
    """exp(-s) L + s is 1 + s there; decay, which is for matrices of the model, would have pulled s to 0."""
    values = tiny(loss="uncertainty", steps=200, data={"source": "wine", "label_noise": 0.4}, batch_size=133)
    values["model"] = {"layers": 1, "width": 2}
    values |= {"optimizer": {"lr": 0.02, "weight_decay": 2.0}, "checkpoint": {"every": 200}}
    (result,) = run_offered([(values, str(tmp_path / "run"))])

    s = last(result)["losses.0.s"].item()
    assert losses(result)[-1] == pytest.approx(1 + s, abs=0.02)
    assert abs(s) > 0.2


def test_they_are_a_group_of_the_optimiser_without_decay():
    """Matrices, too; and a module without parameters leaves the model as it was."""
    model = build_classifier(ClassifierModelSpec(), shape=(4,), classes=3, seed=0)
    before = list(model.state_dict())
    model.attach(OBJECTIVE, Objective(LossSpec()))
    assert list(model.state_dict()) == before

    objective = Objective(LossSpec(name="uncertainty"))
    model.attach(OBJECTIVE, objective)
    (optimizer,) = build_optimizers(model, OptimizerSpec(weight_decay=0.3))
    groups = optimizer.param_groups

    assert {id(p) for p in groups[-1]["params"]} == {id(p) for p in objective.parameters()}
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]


def test_going_on_equals_no_interruption(tmp_path):
    """To the last digit: curve, parameter, and what the loss counts."""
    (whole,) = run_offered([(LEARNT, str(tmp_path / "whole"))])
    (stopped,) = run_offered([(LEARNT, str(tmp_path / "parts"))], stop_after=3)
    (rest,) = run_offered([(LEARNT, str(tmp_path / "parts"))])

    assert stopped["status"] == "stopped"
    assert losses(stopped) + losses(rest) == losses(whole)
    assert all(torch.equal(last(rest)[name], value) for name, value in last(whole).items())


def test_what_belongs_to_a_loss_is_in_no_exported_model(tmp_path):
    """Nor does a run that begins from it need the loss."""
    folder = run_in_folder(LEARNT)
    export_run(folder, tmp_path / "model")
    names = set(read_tensors(tmp_path / "model" / WEIGHTS))

    assert names == set(
        build_classifier(ClassifierModelSpec(width=16), shape=(13,), classes=3, seed=0).state_dict()
    )
    again = run_training(tiny(start=str(tmp_path / "model"), steps=1), None, str(tmp_path / "again"))
    assert again["status"] == "finished"


def test_a_single_number_can_not_be_split(tmp_path, monkeypatch):
    """FSDP can't; the message names the parameter and what would do."""
    plain = Uncertainty.__init__

    def scalar(self, **options):
        plain(self, **options)
        self.s = torch.nn.Parameter(torch.zeros(()))

    monkeypatch.setattr(Uncertainty, "__init__", scalar)
    values = {**LEARNT, "sharding": "fsdp"}
    with (
        pretended_ranks(1),
        pytest.raises(UserError, match=r"sharding=fsdp: objective\.losses\.0\.s is a single number"),
    ):
        run_offered([(values, str(tmp_path))])
