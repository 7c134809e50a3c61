"""Dice, self-adjusting Dice and Tversky losses: what the contract doesn't see, and the form of a batch."""

import math

import pytest
import torch

from lossworks.errors import UserError
from lossworks.losses import create, declarations
from lossworks_testing.formulas import softmax

BATCH = ["batch-dice", "batch-self-adjusting-dice", "batch-tversky"]
SETTINGS = [
    *((slug, {}) for slug in BATCH),
    *((slug, {"gamma": 0.0, "classes": "but-first"}) for slug in BATCH),
    ("batch-dice", {"square": False}),
    ("batch-self-adjusting-dice", {"alpha": 1.0, "square": False}),
    ("batch-tversky", {"alpha": 0.2, "beta": 0.9}),
]
IGNORE = -100


def problem(n=9, k=4, *, dtype=torch.float64, seed=0):
    """Return logits, targets with an ignored one, and weights."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, dtype=dtype, generator=g)
    y = torch.randint(0, k, (n,), generator=g)
    y[2] = IGNORE
    return z.requires_grad_(), y, torch.rand(n, dtype=dtype, generator=g)


def of_batch(slug, z, y, weight, options):
    """Return the loss of each class in plain numbers."""
    losses = []
    for k in range(options["classes"] == "but-first", z.shape[1]):
        overlap = predicted = actual = 0.0
        for row, label, w in zip(z.tolist(), y.tolist(), weight.tolist(), strict=True):
            if label == IGNORE:
                continue
            p, own = softmax(row)[k], float(label == k)
            u = (1 - p) ** options.get("alpha", 0.0) * p if "self" in slug else p
            overlap, actual = overlap + w * u * own, actual + w * own
            predicted += w * (u**2 if options.get("square") else u)
        gamma = options["gamma"]
        if slug == "batch-tversky":
            whole = overlap + options["alpha"] * (predicted - overlap) + options["beta"] * (actual - overlap)
            losses.append(1 - (overlap + gamma) / (whole + gamma))
        else:
            losses.append(1 - (2 * overlap + gamma) / (predicted + actual + gamma))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(("slug", "settings"), SETTINGS)
def test_the_batch_form_is_that_of_the_paper(slug, settings):
    """Values of every class with weights, reductions, and gradients of each with a random upstream one."""
    z, y, weight = problem()
    none, total, mean = (create(slug, reduction=how, **settings) for how in ("none", "sum", "mean"))
    values = none(z, y, weight=weight)
    upstream = torch.randn(len(values), dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(values, of_batch(slug, z, y, weight, none.settings()))
    torch.testing.assert_close(total(z, y, weight=weight), values.sum())
    torch.testing.assert_close(mean(z, y, weight=weight), values.mean())
    assert torch.autograd.gradcheck(lambda z: none(z, y, weight=weight) @ upstream, (z,))


@pytest.mark.parametrize("slug", BATCH)
def test_parts_of_a_batch_add_their_sums_and_descend_on_them(slug):
    """Unequal micro-batches give the whole batch's loss and gradient; adding losses would not."""
    z, y, _ = problem()
    loss, parts = create(slug), (slice(2), slice(2, 9))
    (expected,) = torch.autograd.grad(loss(z, y), z)
    with torch.no_grad():
        total = sum(loss.statistics(z[part], y[part]) for part in parts)
    total.requires_grad_()
    (slope,) = torch.autograd.grad(loss.value(total.flatten()), total)

    gradients = [torch.autograd.grad((loss.statistics(z[p], y[p]) * slope).sum(), z)[0] for p in parts]

    torch.testing.assert_close(loss.value(total.flatten()), loss(z, y))
    torch.testing.assert_close(sum(gradients), expected)
    assert not torch.allclose(sum(loss(z[p], y[p]) for p in parts) / 2, loss(z, y))


def test_of_hard_predictions_it_is_one_minus_f1():
    """And Tversky with both weights one half too; a class that nobody predicts or has costs nothing."""
    g = torch.Generator().manual_seed(0)
    predicted, y = torch.randint(0, 4, (2, 50), generator=g)
    logits = torch.nn.functional.one_hot(predicted, 5).double() * 1e3
    tp = torch.tensor([((predicted == k) & (y == k)).sum() for k in range(4)])
    fp_fn = torch.tensor([((predicted == k) ^ (y == k)).sum() for k in range(4)])
    expected = torch.cat((1 - 2 * tp / (2 * tp + fp_fn), torch.zeros(1)))

    for slug in ("batch-dice", "batch-tversky"):
        values = create(slug, gamma=0.0, reduction="none")(logits, y)
        torch.testing.assert_close(values, expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("slug", BATCH)
def test_one_logit_an_example_is_two_classes_whose_first_is_the_background(slug):
    """The released code's binary form."""
    f, y = torch.randn(8, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1, IGNORE, 0, 1])
    pair = torch.stack((torch.zeros(8), f), -1)

    one = create(slug, reduction="none")(f, y)

    assert one.shape == (1,)
    torch.testing.assert_close(one, create(slug, reduction="none", classes="but-first")(pair, y))


@pytest.mark.parametrize("slug", BATCH)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_ignored_examples_count_for_nothing_in_a_batch(slug, gamma):
    """Whatever their logits are; nothing but ignored is 0 without a gradient."""
    z, y, _ = problem()
    loss, keep = create(slug, gamma=gamma), y != IGNORE
    spoilt = z.detach().clone()
    spoilt[~keep] = math.nan
    spoilt.requires_grad_()

    value = loss(spoilt, y)
    (gradient,) = torch.autograd.grad(value, spoilt)
    nothing = loss(z, torch.full_like(y, IGNORE))

    torch.testing.assert_close(value, loss(z[keep], y[keep]))
    assert gradient[~keep].abs().max() == 0
    assert gradient.isfinite().all()
    assert nothing == 0
    assert torch.autograd.grad(nothing, z)[0].abs().max() == 0


@pytest.mark.parametrize("slug", BATCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite_in_a_batch(slug, dtype):
    """±1e4, without smoothing too."""
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    for y in ([0, 1, 1], [1, 0, 0]):
        for gamma in (0.0, 1.0):
            value = create(slug, gamma=gamma)(z, torch.tensor(y))

            assert value.dtype == torch.float32
            assert value.isfinite()
            assert torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.parametrize("slug", BATCH)
def test_the_batch_form_has_its_special_cases_and_invariances(slug):
    """Declared cases hold; the order of examples and a shift of their logits change nothing."""
    z, y, _ = problem()
    value = create(slug)(z, y)
    for case in declarations()[slug].cases:
        own = create(slug, **case.hyperparameters)(z, y)
        torch.testing.assert_close(own, create(case.equals, **case.other_hyperparameters)(z, y))

    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(create(slug)(z[order], y[order]), value)
    torch.testing.assert_close(create(slug)(z + 3.0, y), value)


def binary(p, y, **settings):
    """Return the self-adjusting Dice loss of an example of two classes, p that of class 1."""
    p = torch.as_tensor(p, dtype=torch.float64)
    logits = torch.stack((torch.log1p(-p), p.log()), -1)
    loss = create("self-adjusting-dice", classes="but-first", reduction="none", **settings)
    return loss(logits, torch.full(p.shape, y))


def test_the_values_of_the_fact_sheet():
    """Of one example, by p, label and α, with γ = 1."""
    expected = {(0.3, 1, 1.0): 0.3574661, (0.3, 0, 1.0): 0.1735537}
    expected |= {(0.9, 1, 1.0): 0.4354067, (0.9, 1, 0.01): 0.0418427}

    for (p, y, alpha), value in expected.items():
        assert binary(p, y, alpha=alpha).item() == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.01])
def test_the_adjusting_weight_turns_the_loss_around(alpha):
    """It is least at p = 1/(1+α)."""
    p = torch.linspace(0.0005, 0.9995, 2000, dtype=torch.float64)

    assert p[binary(p, 1, alpha=alpha).argmin()] == pytest.approx(1 / (1 + alpha), abs=1e-3)


def test_a_detached_weight_always_pulls_up():
    """The gradient of a positive's logit never changes its sign; with the weight in it, it does."""
    slopes = {}
    for detached in (False, True):
        f = torch.linspace(-6, 6, 50, dtype=torch.float64).requires_grad_()
        pair = torch.stack((torch.zeros_like(f), f), -1)
        loss = create("self-adjusting-dice", alpha=1.0, detach_weight=detached, reduction="sum")
        (slopes[detached],) = torch.autograd.grad(loss(pair, torch.ones(50, dtype=torch.int64)), f)

    assert (slopes[True] < 0).all()
    assert (slopes[False] > 0).any()


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), r"logits \(3, 2\) must be \(4, 'K'\) or"),
        (torch.zeros(3, 2), torch.zeros(3), "must be torch.int64"),
        (torch.zeros(3, 2), torch.full((3,), 2), "a class is in"),
        (torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), "needs more than 1 class"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, message):
    """By name."""
    with pytest.raises(UserError, match=message):
        create("batch-dice", classes="but-first")(logits, targets)
