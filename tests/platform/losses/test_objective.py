"""Sums of losses: the sum of their terms, in one pass where they can share it, and every term by its name."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.losses.objective import Objective
from lossworks.models import Outputs
from lossworks.models.interface import Head
from lossworks.specs import LossSpec
from lossworks.tasks import parse_train_spec
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training

ROWS, CLASSES, WIDTH = 12, 7, 5
SUMS = {
    "one pass": [
        "cross-entropy",
        {"name": "ldr", "margin": 0, "weight": 0.3},
        {"name": "comp-sum", "tau": 1.5, "weight": -2},
    ],
    "each its own": [
        {"name": "ldr", "temperature": 0.5},
        {"name": "ldr", "temperature": 2.0, "weight": 0.7},
        {"name": "cross-entropy", "label_smoothing": 0.1},
    ],
    "some together": [
        {"name": "dice", "weight": 0.5},
        {"name": "spherical-z-loss", "weight": 0.2},
        {"name": "comp-sum", "weight": 3},
        {"name": "log-z", "coefficient": 0.3},
        {"name": "log-z", "coefficient": 0.3, "alone": True, "weight": 0.1},
    ],
    "sums before a nonlinearity": ["cross-entropy", {"name": "batch-dice", "weight": 2}, "batch-tversky"],
}


def problem(dtype=torch.float64):
    """Return the outputs of a head, a batch with an ignored row, and the tensors that want a gradient."""
    g = torch.Generator().manual_seed(0)
    e, c, b = (
        torch.randn(s, dtype=dtype, generator=g) for s in ((ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    targets = torch.randint(0, CLASSES, (ROWS,), generator=g)
    targets[3] = -100
    wanted = [x.requires_grad_() for x in (e, c, b)]
    return Outputs(e, Head(c, b)), {"targets": targets}, wanted


def parse_of(terms):
    return parse_train_spec(tiny(loss=terms)).loss


def dense(terms, logits, targets):
    """Return the weighted sum of the terms' means, and each, from the logits."""
    found = []
    for term in parse_of(terms).terms:
        loss = create(term.name, **term.hyperparameters)
        found.append((term.weight.value, loss(logits, targets)))
    return sum(weight * value for weight, value in found), [value.item() for _, value in found]


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_the_sum_of_its_terms(name):
    """Values and gradients in float64, from two unequal parts, against autograd of the logits."""
    outputs, batch, wanted = problem()
    objective = Objective(parse_of(SUMS[name]))
    total, each = dense(SUMS[name], outputs.logits, batch["targets"])
    expected = torch.autograd.grad(total, wanted)

    parts = [slice(0, 5), slice(5, ROWS)]
    cut = [(Outputs(outputs.hidden[p], outputs.head), {"targets": batch["targets"][p]}) for p in parts]
    sums = [objective(*part) for part in cut]
    counts = [sum(column) for column in zip(*(objective.counts(part) for _, part in cut), strict=True)]
    whole = sum(sums).detach()
    slopes = objective.slopes(whole, counts)
    found = torch.autograd.grad(sum((part * slopes).sum() for part in sums), wanted, retain_graph=True)
    value, terms = objective.value(whole, counts)

    assert value == pytest.approx(total.item(), rel=1e-9)
    assert list(terms.values()) == pytest.approx(each, rel=1e-9)
    torch.testing.assert_close(found, expected)
    differentiable = objective.total(sum(sums), counts)
    torch.testing.assert_close(torch.autograd.grad(3 * differentiable, wanted[0])[0], 3 * expected[0])


def test_terms_that_read_the_same_numbers_share_three_products():
    """As many operations as plain cross-entropy; each on its own would take as many again."""

    def operations(terms):
        outputs, batch, wanted = problem(torch.float32)
        objective = Objective(parse_of(terms))
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(objective(outputs, batch).sum(), wanted)
        return counter.get_total_flops()

    plain = operations("cross-entropy")
    assert operations(SUMS["one pass"]) == plain
    assert operations([{"name": "ldr", "temperature": t} for t in (0.5, 1, 2)]) == 3 * plain
    assert operations(["cross-entropy", {"name": "ldr", "margin": 0.5}, "comp-sum"]) == 2 * plain


def test_a_term_of_weight_0_is_measured_and_not_trained():
    """Whichever term it is, the others' gradient is theirs."""
    for terms in ([{"name": "ldr", "weight": 0}, "comp-sum"], ["comp-sum", {"name": "ldr", "weight": 0}]):
        outputs, batch, wanted = problem()
        objective = Objective(parse_of(terms))
        sums, counts = objective(outputs, batch), objective.counts(batch)
        value, parts = objective.value(sums.detach(), counts)
        own, other = (create(slug)(outputs.logits, batch["targets"]) for slug in ("comp-sum", "ldr"))

        assert value == pytest.approx(own.item())
        assert parts["ldr"] == pytest.approx(other.item())
        torch.testing.assert_close(
            torch.autograd.grad((sums * objective.slopes(sums, counts)).sum(), wanted, retain_graph=True),
            torch.autograd.grad(own, wanted),
        )


def test_nothing_that_counts_is_no_loss():
    """A stand-in's rows give 0 and no gradient, for every way of adding."""
    for terms in SUMS.values():
        outputs, batch, wanted = problem()
        batch = {"targets": torch.full_like(batch["targets"], -100)}
        objective = Objective(parse_of(terms))
        sums, counts = objective(outputs, batch), objective.counts(batch)
        gradients = torch.autograd.grad((sums * objective.slopes(sums.detach(), counts)).sum(), wanted)

        assert objective.value(sums.detach(), counts)[0] == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_weights_may_go_in_a_line():
    """The paper's warm start: cross-entropy for a while, and then less of it, down to none."""
    spec = parse_of(
        [{"name": "cross-entropy", "weight": {"value": 2, "final": 0, "start": 3, "steps": 4}}, "ldr"]
    )
    objective = Objective(spec)
    seen = []
    for step in range(1, 10):
        objective.begin(step)
        seen.append(objective.weights)

    assert [first for first, _ in seen] == [2, 2, 2, 1.5, 1, 0.5, 0, 0, 0]
    assert {second for _, second in seen} == {1.0}
    assert str(spec.weight) == "2 to 0 in 4 steps"


def test_a_sum_survives_being_stored():
    """With weights and how the head is computed; a slug that is there twice has a number."""
    values = tiny(
        loss=[{"name": "ldr", "impl": "reference", "weight": 0.5}, "ldr", {"name": "log-z", "alone": True}]
    )
    first = parse_train_spec(values)
    again = parse_train_spec(first.model_dump(mode="json"))

    assert again == first
    assert again.loss.titles == ("ldr-1", "ldr-2", "log-z")


def test_one_loss_takes_the_place_of_a_sum_as_a_whole():
    """Also where it was the sum's first: with the weight of its own that is said, and no other."""
    spec = parse_train_spec(tiny(loss=[{"name": "ldr", "temperature": 3, "weight": 0.5}, "comp-sum"]))

    for slug in ("ldr", "comp-sum"):
        assert spec.override([f"loss={slug}"]).loss == LossSpec(name=slug)
    assert spec.override(["loss.plus=[]"]).loss.weight.value == 0.5
    assert spec.override(["loss=ldr", "loss.temperature=2", "loss.weight=4"]).loss == LossSpec.parse(
        {"name": "ldr", "temperature": 2, "weight": 4}
    )
    assert spec.override(["loss=[dice, tversky]"]).loss.titles == ("dice", "tversky")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            ["ldr", {"name": "ldr", "plus": ["comp-sum"]}],
            "plus: ldr has further terms of its own; put all into",
        ),
        (
            ["ldr", {"name": "comp-sum", "impl": "cpu"}],
            "plus: impl=cpu of comp-sum must be that of ldr, auto",
        ),
        (["ldr", "dco-step"], "loss.name=dco-step can't train task=classification"),
        (
            ["cross-entropy", "neural-collapse"],
            "is one of the analyses, not of the losses; name it in analyses: [neural-collapse]",
        ),
        (
            ["cross-entropy", "correctness-aware"],
            "is one of the methods, not of the losses; name it in methods: [correctness-aware]",
        ),
        (["ldr", {"weight": 2}], "item 1 of the list has no name"),
        (
            ["ldr", {"name": "ldr", "weight": "much"}],
            "loss.1.weight.value='much': input should be a valid",
        ),
        (
            [{"name": "ldr", "weight": {"value": 1, "final": 0, "steps": 0}}],
            "weight.steps=0: input should be",
        ),
    ],
)
def test_what_does_not_add_up_is_refused(loss, message):
    """In words, with what would be right."""
    with pytest.raises(UserError) as refused:
        parse_train_spec(tiny(loss=loss))
    assert message in str(refused.value)


def test_every_term_is_logged_and_their_sum_is_the_loss(tmp_path):
    """At the weights of the step; held-out data are measured by the same sum."""
    line = {"value": 1, "final": 0, "start": 2, "steps": 2}
    terms = [{"name": "cross-entropy", "weight": line}, {"name": "ldr", "weight": 0.5}, "batch-dice"]
    result = run_training(tiny(loss=terms), None, str(tmp_path))

    for step, row in result["rows"]:
        weights = [float(spec.weight.at(step)) for spec in parse_of(terms).terms]
        parts = [row[f"train/loss/{name}"] for name in ("cross-entropy", "ldr", "batch-dice")]
        assert row["train/loss"] == pytest.approx(sum(w * v for w, v in zip(weights, parts, strict=True)))
    assert weights == [0, 0.5, 1]
    assert result["status"] == "finished"


@pytest.mark.parametrize("terms", [["cross-entropy", "ldr"], ["cross-entropy", "ldr", "batch-dice"]])
def test_a_term_that_is_not_finite_is_named(terms, tmp_path, monkeypatch):
    """And not another that shares its pass."""
    from lossworks.entries.losses.classification.ldr import LDR

    plain = LDR.phi
    monkeypatch.setattr(LDR, "phi", lambda *arguments: plain(*arguments) * math.nan)
    result = run_training(tiny(loss=terms), None, str(tmp_path))

    assert result["status"] == "diverged"
    assert result["reason"].startswith("the loss ldr became NaN or infinite at step 1 on rank 0")
