"""Dual-head distillation: the exact checks of its formula, its second head, and gradients that agree."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.losses.objective import Objective
from lossworks.models.interface import Head, Outputs
from lossworks.specs import LossSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, Trainer
from lossworks.training.weights.export import export_run
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_several, run_training

SLUG = "dual-head-distillation"
DUAL = [{"name": "cross-entropy"}, {"name": SLUG, "weight": 0.3}]
ROLES = {"roles": {"teacher": {"ema": 0.8}}}


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))


def pair(rows=5, classes=7):
    g = torch.Generator().manual_seed(0)
    s, t = (3 * torch.randn(rows, classes, dtype=torch.float64, generator=g) for _ in range(2))
    return s.requires_grad_(), t, torch.randint(0, classes, (rows,), generator=g)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_it_is_the_divergence_of_coins(temperature):
    """τ² Σ_k KL(Bernoulli(½) ‖ Bernoulli(σ(d))), which is Σ log cosh(d/2), with gradient τ/2 tanh(d/2)."""
    s, t, y = pair()
    d = (s - t) / temperature
    p = d.sigmoid()
    coins = (0.5 * (0.5 / p).log() + 0.5 * (0.5 / (1 - p)).log()).sum(1)
    found = create(SLUG, temperature=temperature, reduction="none")(s, y, teacher=t)

    torch.testing.assert_close(found, temperature**2 * coins)
    torch.testing.assert_close(found, temperature**2 * (d / 2).cosh().log().sum(1))
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), s)[0], temperature / 2 * (d.detach() / 2).tanh()
    )
    assert torch.autograd.gradcheck(lambda s: create(SLUG, temperature=temperature)(s, y, teacher=t), (s,))


def test_it_vanishes_where_logits_are_the_teacher_s_and_there_alone():
    """It sees a common shift, which distillation through a softmax does not, and no order of the classes."""
    s, t, y = pair()
    loss = create(SLUG, reduction="none")
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))

    assert loss(t, y, teacher=t).abs().max() < 1e-15
    assert loss(s, y, teacher=t).min() > 0
    torch.testing.assert_close(loss(s[:, order], y, teacher=t[:, order]), loss(s, y, teacher=t))
    assert not torch.allclose(loss(s + 1, y, teacher=t), loss(s, y, teacher=t))
    small = 1e-2 * torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(loss(t + small, y, teacher=t), small.square().sum(1) / 8, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("gap", [60.0, -60.0, 1e4])
def test_a_large_gap_is_finite_with_its_whole_slope(gap):
    """In float32, where the released code's clamp is none: the slope is ±τ/2N."""
    s = torch.full((2, 1), gap, requires_grad=True)
    value = create(SLUG, temperature=1.0)(s, torch.zeros(2, dtype=torch.int64), teacher=torch.zeros(2, 1))
    (slope,) = torch.autograd.grad(value, s)

    assert value.item() == pytest.approx(abs(gap) / 2 - math.log(2))
    assert slope.flatten().tolist() == pytest.approx([math.copysign(0.25, gap)] * 2)


def classifier(width=4, classes=3):
    """Return outputs of a linear model with two features of inputs, and the loss's sum with cross-entropy."""
    g = torch.Generator().manual_seed(0)
    inputs, body, head, teacher = (
        torch.randn(shape, generator=g) for shape in ((6, 5), (width, 5), (classes, width), (6, classes))
    )
    body.requires_grad_(), head.requires_grad_()
    y = torch.randint(0, classes, (6,), generator=g)
    roles = {"teacher": Outputs(torch.empty(0), None, dense=5 * teacher)}
    return inputs, body, head, y, roles


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_classifier_is_trained_by_the_labels_alone(kind):
    """Its gradient is that of cross-entropy; the features get both."""
    inputs, body, head, y, roles = classifier()
    objective = Objective(
        LossSpec.parse({"name": "cross-entropy", "plus": [{"name": SLUG, "head": kind, "weight": 0.5}]})
    )

    class Headed:
        def head(self):
            return Head(head)

    objective.fit_to(Headed())
    outputs = Outputs(inputs @ body.T, Head(head), roles=roles)
    total = objective.total(objective(outputs, {"targets": y}), [6.0, 6.0])
    plain = create("cross-entropy").of(Outputs(inputs @ body.T, Head(head)), {"targets": y})

    of_head = [torch.autograd.grad(value, head, retain_graph=True)[0] for value in (total, plain)]
    torch.testing.assert_close(*of_head, rtol=1e-5, atol=1e-6)
    of_body = [torch.autograd.grad(value, body, retain_graph=True)[0] for value in (total, plain)]
    assert not torch.allclose(*of_body)
    names = [name for name, _ in objective.named_parameters()]
    assert len(names) == {"linear": 2, "mlp": 6}[kind]


def test_batch_normalisation_counts_valid_rows_and_keeps_means():
    """As torch's own, of the rows with a target; evaluation reads what was kept."""
    inputs, body, head, y, _ = classifier()
    y[4:] = -100
    loss = create(SLUG, head="mlp", reduction="none")

    class Headed:
        def head(self):
            return Head(head)

    loss.fit_to(Headed())
    auxiliary, features = loss.auxiliary, (inputs @ body.T).detach()
    first = auxiliary.first(features)
    valid = y != -100
    torch.manual_seed(0)
    found = auxiliary.logits(features, valid, training=True)  # with dropout
    torch.manual_seed(0)
    dropped = F.dropout(first, 0.1)
    auxiliary.moments[0], auxiliary.moments[1] = 0, 1
    torch.manual_seed(0)
    auxiliary.logits(features, valid, training=True)
    again = torch.nn.BatchNorm1d(200)
    torch.testing.assert_close(found[:4], auxiliary.last(again(dropped[:4]).relu()))
    torch.testing.assert_close(auxiliary.moments, torch.stack((again.running_mean, again.running_var)))
    loss.eval()
    torch.testing.assert_close(
        loss.own_logits(Outputs(features, None), valid)[:4], auxiliary.last(again.eval()(first[:4]).relu())
    )


def test_without_a_model_there_is_no_second_head():
    inputs, body, head, y, roles = classifier()
    with pytest.raises(UserError, match=r"has no second head; call fit_to\(model\) first"):
        create(SLUG).of(Outputs(inputs @ body.T, Head(head), roles=roles), {"targets": y})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_going_on_equals_no_interruption_and_exports_have_one_head(kind, tmp_path):
    values = tiny(batch_size=21, loss=[DUAL[0], {**DUAL[1], "head": kind}], **ROLES)
    whole = run_training(values, None, str(tmp_path / "whole"))
    run_training(values, None, str(tmp_path / "parts"), stop_after=4)
    rest = run_training(values, None, str(tmp_path / "parts"))

    assert losses(rest) == losses(whole)[4:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    if kind == "linear":
        export_run(run_in_folder(values, "dual"), tmp_path / "exported")
        export_run(run_in_folder(tiny(), "plain"), tmp_path / "plain")
        sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("exported", "plain")]
        assert sizes[0] == sizes[1]


ALIGNED = {"methods": ["gradient-alignment"]}


def steps_of(result):
    """Return a result without what methods found in the end."""
    return {"rows": [row for row in result["rows"] if "train/loss" in row[1]]}


def test_ranks_give_what_one_process_gives(tmp_path):
    """As replicas, aligned too, and with split parameters; micro-batches of unequal number of rows."""
    base = tiny(batch_size=21, loss=DUAL, optimizer={"lr": 0.02, "clip_norm": None}, **ROLES)
    split = {**base, "workers": 2, "micro_batch_size": 4}
    cases = {"plain": {}, "aligned": ALIGNED}
    alone = {name: run_training({**base, **more}, None, str(tmp_path / name)) for name, more in cases.items()}
    runs = [
        ({**split, "sharding": "ddp"}, str(tmp_path / "1")),
        ({**split, **ALIGNED, "sharding": "ddp"}, str(tmp_path / "2")),
        ({**split, "sharding": "fsdp"}, str(tmp_path / "3")),
    ]
    (tmp_path / "ranks").mkdir()
    found = run_ranks(2, run_several, runs, None, folder=tmp_path / "ranks")[0]

    for two, name in zip(found, ("plain", "aligned", "plain"), strict=True):
        assert losses(steps_of(two)) == pytest.approx(losses(steps_of(alone[name])), rel=1e-4)
        assert two["metrics"]["eval/loss"] == pytest.approx(alone[name]["metrics"]["eval/loss"], rel=1e-4)


def trainer(values, folder) -> Trainer:
    """Return a run before its first step."""
    found = Trainer(Job(parse_train_spec(values), None, CheckpointStore(folder, keep=2), lambda *_: None))
    found.clock.start()
    found.model.train()
    found._begin()
    return found


@pytest.mark.parametrize("weight", [1.0, -1.0], ids=["agreeing", "conflicting"])
def test_what_opposes_the_first_loss_is_taken_out(weight, tmp_path, monkeypatch):
    """On the body alone, by the paper's formula; a step without a conflict keeps every bit.

    Minus log-z of cross-entropy's own logits conflicts with it, and the head keeps the sum's gradient.
    """
    terms = [{"name": "cross-entropy"}, {"name": "comp-sum", "tau": 1.7, "weight": 2 * weight}]
    values = tiny(batch_size=30, micro_batch_size=7, loss=terms, optimizer={"lr": 0.01, "clip_norm": None})
    seen = {}

    def keep(run, name):
        def recorded(*_, **__):
            seen[name] = {n: p.grad.clone() for n, p in run.headed_model.named_parameters()}
            return 1.0

        return recorded

    cases = {
        "sum": {},
        "aligned": ALIGNED,
        "first": {"loss": [{"name": "cross-entropy"}]},
    }
    for name, more in cases.items():
        run = trainer({**values, **more}, tmp_path / name)
        monkeypatch.setattr("lossworks.training.loop.clip_gradients", keep(run, name))
        run._train_step(1)
    body = [n for n in seen["sum"] if n.startswith("layers")]
    first, total = ([seen[name][n].double() for n in body] for name in ("first", "sum"))
    further = [t - f for t, f in zip(total, first, strict=True)]
    dot, norm = (sum((a * b).sum() for a, b in zip(x, first, strict=True)) for x in (further, first))

    assert (dot < 0) == (weight < 0)
    for n, f, t in zip(body, first, total, strict=True):
        expected = t - min(dot / norm, 0) * f
        torch.testing.assert_close(seen["aligned"][n].double(), expected, rtol=1e-4, atol=1e-7)
    heads = [n for n in seen["sum"] if n not in body]
    assert heads
    for n in heads:
        torch.testing.assert_close(seen["aligned"][n], seen["sum"][n], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "gradient-alignment needs a sum of losses"),
        ({"loss": DUAL, **ROLES, "sharding": "fsdp"}, "needs whole parameters on each worker"),
        ({"loss": DUAL, **ROLES, "compile": True}, "can't be combined with compile=true"),
        ({"loss": ["cross-entropy", "batch-dice"]}, "needs losses of single elements, unlike batch-dice"),
    ],
    ids=["one loss", "fsdp", "compiled", "whole batches"],
)
def test_runs_that_cannot_be_aligned_are_refused(changes, words):
    with pytest.raises(UserError, match=words):
        parse_train_spec(tiny(**ALIGNED, **changes))


def test_the_gap_to_the_teacher_is_measured_of_both_heads(tmp_path):
    """The second head comes nearer to the teacher's logits than the classifier."""
    run_in_folder(tiny(steps=40, model={"width": 24}), "teacher")
    taught = {"roles": {"teacher": "teacher"}, "analyses": ["teacher-gap"], "steps": 60}
    dual, plain = (
        run_training(tiny(**taught, loss=loss), None, str(tmp_path / name))["metrics"]
        for name, loss in (("dual", DUAL), ("plain", "cross-entropy"))
    )

    assert dual["eval/teacher_gap"] < 0.7 * dual["eval/model_gap"]
    assert plain["eval/teacher_gap"] == plain["eval/model_gap"]
    assert 0.8 < plain["eval/teacher_agreement"] <= 1
    assert json.dumps(plain["eval/teacher_kl"])
