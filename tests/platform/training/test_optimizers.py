"""Optimisers by kind: closed forms, which parameter gets which, ranks, going on, and refusals."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import build_classifier, build_model
from lossworks.specs import ClassifierModelSpec, LossSpec, ModelSpec, OptimizerSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.loop import Trainer
from lossworks.training.optimizer import OBJECTIVE, body_matrices, build_optimizers, set_lr
from lossworks.training.packed import obstacle
from lossworks_testing.classification import tiny
from lossworks_testing.offered import Uncertainty, offer
from lossworks_testing.ranks import run_ranks
from lossworks_testing.split_steps import all_differences
from lossworks_testing.training import losses, run_several, run_training, tiny_spec

KINDS = {
    "sgd": {"lr": 0.3},
    "muon": {"lr": 0.02},
    "adafactor": {"lr": 0.05},
}
"""Kinds besides adamw, each with a learning rate that suits a tiny language model."""


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4), nn.Linear(4, 9))


def stepped(model, spec, gradients):
    """Step a model by gradients, and return its optimisers."""
    optimizers = build_optimizers(model, spec)
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers


def drawn(model, steps):
    return [[torch.randn_like(parameter) for parameter in model.parameters()] for _ in range(steps)]


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_its_formula(nesterov):
    """v ← μv + g + λw and w ← w − η·v, or w − η·(g + λw + μv); only matrices decay."""
    model = small_model()
    expected = [parameter.detach().double() for parameter in model.parameters()]
    gradients = drawn(model, 3)
    spec = OptimizerSpec(kind="sgd", lr=0.1, weight_decay=0.5, momentum=0.8, nesterov=nesterov)
    stepped(model, spec, gradients)

    velocity = [torch.zeros_like(value) for value in expected]
    for step in gradients:
        for place, (value, gradient) in enumerate(zip(expected, step, strict=True)):
            g = gradient.double() + (0.5 * value if value.dim() > 1 else 0.0)
            velocity[place] = 0.8 * velocity[place] + g
            expected[place] = value - 0.1 * (g + 0.8 * velocity[place] if nesterov else velocity[place])
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("adjust", "factor"),
    [
        ("original", lambda rows, columns: max(1, rows / columns) ** 0.5),
        ("match_rms_adamw", lambda rows, columns: 0.2 * max(rows, columns) ** 0.5),
    ],
)
def test_an_update_of_muon_is_orthogonal(adjust, factor):
    """Up to its factor and the decay, all singular values are near 1: within what five iterations leave."""
    model = small_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    spec = OptimizerSpec(kind="muon", lr=0.1, weight_decay=0.5, adjust_lr_fn=adjust)
    stepped(model, spec, drawn(model, 1))

    for matrix, old in zip(model.parameters(), before, strict=True):
        if matrix.dim() == 2:
            update = (old * (1 - 0.1 * 0.5) - matrix.detach()) / (0.1 * factor(*matrix.shape))
            values = torch.linalg.svdvals(update)
            assert values.min() > 0.6
            assert values.max() < 1.25


def test_adafactor_is_that_of_torch():
    """To the bit, with the decay that ours gives matrices alone."""
    ours, theirs = small_model(), small_model()
    gradients = drawn(ours, 3)
    spec = OptimizerSpec(kind="adafactor", lr=0.1, weight_decay=0.5, eps=(1e-9, 0.01), d=2.0)
    stepped(ours, spec, gradients)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.5},
        {"params": [p for p in theirs.parameters() if p.dim() < 2]},
    ]
    optimizer = torch.optim.Adafactor(groups, lr=0.1, eps=(1e-9, 0.01), d=2.0)
    for step in gradients:
        for parameter, gradient in zip(theirs.parameters(), step, strict=True):
            parameter.grad = gradient
        optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_moves_the_matrices_of_the_body_and_adamw_the_rest(tied):
    """Embedding and head are AdamW's, be they one matrix or two; and every parameter has one optimiser."""
    model = build_model(ModelSpec(layers=1, width=8, heads=2, tied=tied), vocab_size=300, seed=0)
    spec = OptimizerSpec(kind="muon", lr=0.1, adamw_lr=0.01, weight_decay=0.3)
    muon, adamw = build_optimizers(model, spec)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_muon, decaying, others = (
        {names[id(parameter)] for parameter in group["params"]}
        for group in (*muon.param_groups, *adamw.param_groups)
    )

    assert of_muon == {
        f"layers.0.{name}.weight"
        for name in ("attention.qkv", "attention.output", "feed_forward.gate_up", "feed_forward.down")
    }
    assert decaying == {"embedding.weight"} | (set() if tied else {"lm_head.weight"})
    assert others == set(names.values()) - of_muon - decaying
    set_lr((muon, adamw), 0.5)
    rates = [group["lr"] for group in (*muon.param_groups, *adamw.param_groups)]
    assert rates == [0.05, 0.005, 0.005]


def test_what_a_loss_learns_is_of_adamw_and_does_not_decay(monkeypatch):
    """Its matrices, too, and under every kind it is a group of its own."""
    offer(monkeypatch, Uncertainty)
    for kind in ("adamw", *KINDS):
        model = build_classifier(ClassifierModelSpec(), shape=(4,), classes=3, seed=0)
        objective = Objective(LossSpec(name="uncertainty"))
        model.attach(OBJECTIVE, objective)
        optimizers = build_optimizers(model, OptimizerSpec(kind=kind, weight_decay=0.3))
        last = optimizers[-1].param_groups[-1]

        assert {id(p) for p in last["params"]} == {id(p) for p in objective.parameters()}
        assert last["weight_decay"] == 0.0
        assert len(body_matrices(model)) == 2


def test_split_parameters_take_the_steps_of_whole_ones(tmp_path):
    """Of every kind and shape, also where a rank has no row: to the bit, given equal gradients."""
    for found in run_ranks(2, all_differences, folder=tmp_path):
        assert {kind: max(values) for kind, values in found.items()} == dict.fromkeys(found, 0.0)


@pytest.fixture(scope="module")
def runs(text, corpus, tmp_path_factory):
    """Runs of every kind: in one process, and on two ranks as replicas, split, and with a split head."""
    folder = tmp_path_factory.mktemp("optimizers")
    ways = {
        "alone": {},
        "ddp": {"workers": 2, "sharding": {"kind": "ddp"}},
        "fsdp": {"workers": 2, "sharding": {"kind": "fsdp"}},
        "vocab": {"workers": 2, "sharding": {"kind": "fsdp", "vocab_parallel": True}},
    }
    specs = {
        (kind, way): tiny_spec(text, optimizer={"kind": kind, **own}, model={"tied": False}, **changes)
        for kind, own in KINDS.items()
        for way, changes in ways.items()
    }
    given = {key: (spec.model_dump(mode="json"), str(folder / "-".join(key))) for key, spec in specs.items()}
    alone = {key: value for key, value in given.items() if key[1] == "alone"}
    split = {key: value for key, value in given.items() if key[1] != "alone"}
    found = dict(zip(alone, run_several(list(alone.values()), corpus), strict=True))
    results = run_ranks(2, run_several, list(split.values()), corpus, folder=folder)[0]
    return found | dict(zip(split, results, strict=True)), specs


@pytest.mark.parametrize("way", ["ddp", "fsdp", "vocab"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_parameters_of_one_process(runs, kind, way):
    """Muon's products are in bfloat16, which makes more of the rounding of the gradients' sums."""
    alone, together = runs[0][kind, "alone"], runs[0][kind, way]
    tolerance = {"rtol": 1e-2, "atol": 2e-3} if kind == "muon" else {"rtol": 1e-4, "atol": 1e-5}

    assert losses(together) == pytest.approx(losses(alone), rel=1e-3 if kind == "muon" else 2e-5)
    expected = tensors_in(Path(alone["checkpoint"]), "model.")
    found = tensors_in(Path(together["checkpoint"]), "model.")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_run_goes_on_in_one_process(runs, corpus, kind):
    """What optimisers keep of split parameters is put together again: the curve is that of one process."""
    results, specs = runs
    split = Path(results[kind, "fsdp"]["checkpoint"])
    (split / "manifest.json").unlink()  # the last one; that of step 3 stays
    rest = run_training(specs[kind, "alone"].model_dump(mode="json"), corpus, str(split.parent))

    assert [step for step, _ in rest["rows"]] == [4, 5, 6]
    assert losses(rest) == pytest.approx(losses(results[kind, "alone"])[3:], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_going_on_equals_no_interruption(text, corpus, tmp_path, kind):
    """To the last digit of curve and parameters."""
    values = tiny_spec(text, optimizer={"kind": kind, **KINDS[kind]}).model_dump(mode="json")
    whole = run_training(values, corpus, str(tmp_path / "whole"))
    stopped = run_training(values, corpus, str(tmp_path / "parts"), stop_after=4)
    rest = run_training(values, corpus, str(tmp_path / "parts"))

    assert stopped["status"] == "stopped"
    assert losses(stopped) + losses(rest) == losses(whole)
    expected = tensors_in(Path(whole["checkpoint"]), "model.")
    found = tensors_in(Path(rest["checkpoint"]), "model.")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_sgd_without_momentum_keeps_nothing_and_goes_on(tmp_path):
    values = tiny(optimizer={"kind": "sgd", "momentum": 0.0, "lr": 0.1})
    whole = run_training(values, None, str(tmp_path / "whole"))
    stopped = run_training(values, None, str(tmp_path / "parts"), stop_after=4)
    rest = run_training(values, None, str(tmp_path / "parts"))

    assert losses(stopped) + losses(rest) == losses(whole)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sgd", {"momentum": 0.5, "nesterov": True}),
        ("muon", {"momentum": 0.5, "ns_steps": 3, "adjust_lr_fn": "original"}),
        ("adafactor", {"beta2_decay": -0.5, "d": 2.0}),
    ],
)
def test_settings_may_change_where_a_run_goes_on(monkeypatch, tmp_path, kind, settings):
    """Those of the spec that goes on hold, and what the optimiser has kept stays."""
    restored = []

    def restore(trainer):
        plain(trainer)
        restored.append(trainer.optimizers[0])

    plain = Trainer._restore
    monkeypatch.setattr(Trainer, "_restore", restore)
    run_training(tiny(optimizer=kind, steps=3), None, str(tmp_path))
    changed = tiny(optimizer={"kind": kind, "weight_decay": 0.25, **settings}, steps=4)
    result = run_training(changed, None, str(tmp_path))
    group = restored[-1].param_groups[0]

    assert [step for step, _ in result["rows"]] == [4]
    assert {name: group[name] for name in settings} == settings
    assert group["weight_decay"] == 0.25
    assert all(any(torch.any(v != 0) for v in state.values()) for state in restored[-1].state.values())


@pytest.mark.parametrize("kind", ["adamw", *KINDS])
def test_a_language_model_learns(text, corpus, tmp_path, kind):
    """From ln V, in 40 steps."""
    own = KINDS.get(kind, {"lr": 0.02})
    spec = tiny_spec(
        text, steps=40, optimizer={"kind": kind, **own}, evaluation={"every": 40}, checkpoint={"every": 40}
    )
    curve = losses(run_training(spec.model_dump(mode="json"), corpus, str(tmp_path)))

    assert curve[-1] < curve[0] - 0.8


@pytest.mark.parametrize(
    ("optimizer", "why"),
    [
        (
            {"momentum": 0.9},
            r"optimizer: momentum=0\.9: kind=adamw does not read it; it is of kind=sgd",
        ),
        (
            {"kind": "sgd", "betas": [0.9, 0.9]},
            r"betas=.*: kind=sgd does not read it; it is of kind=adamw",
        ),
        ({"kind": "sgd", "momentum": 1.0}, r"kind=sgd: momentum=1\.0: input should be less than 1"),
        ({"kind": "sgd", "momentum": 0, "nesterov": True}, "nesterov=true needs momentum above 0"),
        ({"kind": "muon", "ns_steps": 100}, "kind=muon: ns_steps=100"),
        ({"kind": "muon", "adjust_lr_fn": "orignal"}, "did you mean original"),
        ({"kind": "adafactor", "beta2_decay": 0.8}, r"kind=adafactor: beta2_decay=0\.8"),
        ({"kind": "adafactor", "eps": 1e-8}, "kind=adafactor: eps="),
        ({"kind": "adagrad"}, "optimizer.kind='adagrad'"),
        ({"weight_decya": 0.1}, "weight_decya=0.1: unknown key of kind=adamw; did you mean weight_decay"),
    ],
)
def test_what_a_kind_does_not_take_is_refused(optimizer, why):
    with pytest.raises(UserError, match=why):
        parse_train_spec(tiny(optimizer=optimizer))


@pytest.mark.parametrize("model", [{"layers": 0}, {"kind": "cnn", "width": 8}])
def test_muon_needs_matrices_in_the_body(model):
    """As the spec is read, and where a model of another package has none."""
    with pytest.raises(UserError, match=r"optimizer\.kind=muon moves the matrices between inputs and head"):
        parse_train_spec(tiny(optimizer="muon", model=model))
    with pytest.raises(UserError, match=r"optimizer\.kind=muon: the model has no matrices"):
        build_optimizers(nn.Sequential(nn.RMSNorm(3)), OptimizerSpec(kind="muon"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_adamw_is_packed(kind):
    assert f"optimizer.kind={kind}" in str(obstacle(parse_train_spec(tiny(optimizer=kind))))


def test_a_stored_spec_takes_another_kind():
    """Fields of the kind that a stored spec had go with it; the others stay."""
    stored = parse_train_spec(parse_train_spec(tiny(optimizer={"lr": 0.5, "betas": [0.5, 0.6]})).model_dump())
    other = stored.override(["optimizer=sgd", "optimizer.momentum=0.5"])

    assert other.optimizer == OptimizerSpec(kind="sgd", lr=0.5, momentum=0.5)
