"""EnsLoss: what it draws is the derivative of some convex, calibrated loss, and it can be drawn again."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lossworks.entries.losses.classification.ensloss import derivatives, inverse_box_cox
from lossworks.errors import UserError
from lossworks.losses import create, declarations

IGNORE = -100
SETTINGS = [{}, {"power": 1.0}, {"power": -1.0}, {"power": 0.3}, {"period": 2}]
by_setting = pytest.mark.parametrize("settings", SETTINGS)


def problem(n=64, *, dtype=torch.float64, seed=0):
    """Return logits, most of whose margins are within 4, and targets with some ignored."""
    g = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(n, dtype=dtype, generator=g)
    y = torch.randint(0, 2, (n,), generator=g)
    y[1::9] = IGNORE
    return f.requires_grad_(), y


def of_batch(f, y, normal, power):
    """Return g of each element in plain numbers, 0 where ignored."""
    drawn = []
    for xi in normal:
        base = max(0.0, 1 + power * xi)
        v = (
            math.exp(xi)
            if power == 0
            else (math.inf if power < 0 else 0.0)
            if base == 0
            else base ** (1 / power)
        )
        drawn.append(-min(1.0, v))
    margins = {
        i: (2 * label - 1) * value for i, (value, label) in enumerate(zip(f, y, strict=True)) if label >= 0
    }
    g = [0.0] * len(f)
    for value, i in zip(sorted(drawn), sorted(margins, key=margins.get), strict=True):
        g[i] = value / (margins[i] if margins[i] > 1 else 1.0) - 1e-6
    return torch.tensor(g, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, -1.0])
def test_it_descends_on_what_the_paper_draws(power):
    """Value and gradient of each element from the numbers drawn, for every reduction."""
    f, y = problem()
    normal = np.random.default_rng([7, 0, 0]).standard_normal(int((y >= 0).sum()))
    g = of_batch(f.tolist(), y.tolist(), normal.tolist(), power)
    sign = torch.where(y == 1, 1.0, -1.0).double()
    upstream = torch.randn(len(y), dtype=torch.float64)
    none, total, mean = (
        create("ensloss", power=power, seed=7, reduction=how) for how in ("none", "sum", "mean")
    )

    values = none(f, y)

    torch.testing.assert_close(values, g * sign * f)
    torch.testing.assert_close(torch.autograd.grad(values @ upstream, f)[0], g * sign * upstream)
    torch.testing.assert_close(torch.autograd.grad(3 * total(f, y), f)[0], 3 * g * sign)
    torch.testing.assert_close(torch.autograd.grad(mean(f, y), f)[0], g * sign / (y >= 0).sum())


@by_setting
def test_derivatives_are_those_of_a_convex_calibrated_loss(settings):
    """They don't fall with the margin, are negative, and at most 1 in magnitude; beyond 1 they fade."""
    loss = create("ensloss", reduction="sum", **settings)
    f, _ = problem(n=500)
    for _ in range(5):
        (g,) = torch.autograd.grad(loss(f, torch.ones(500, dtype=torch.int64)), f)
        g = g[f.argsort()]

        assert (g < 0).all()
        assert (g >= -1 - 1e-6).all()
        inside = f.sort().values <= 1
        assert (g[inside].diff() >= 0).all()
        assert (g[~inside].abs() <= 1 / f.sort().values[~inside] + 1e-6).all()


def test_the_transform_is_continuous_at_lambda_0():
    """From both sides, and half of the draws are clipped there; the mean is the fact sheet's -0.76."""
    normal = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = inverse_box_cox(normal, 0.0)

    for power in (1e-9, -1e-9):
        torch.testing.assert_close(inverse_box_cox(normal, power), v, atol=1e-7, rtol=0)
    assert (v == 1).double().mean().item() == pytest.approx(0.5, abs=0.005)
    assert v.mean().item() == pytest.approx(0.76, abs=0.005)


def test_permuting_the_batch_permutes_the_derivatives():
    """Of the same draws."""
    margins, normal = torch.randn(2, 40, dtype=torch.float64)
    order = torch.randperm(40)

    torch.testing.assert_close(
        derivatives(margins[order], normal, 0.0), derivatives(margins, normal, 0.0)[order]
    )


@by_setting
def test_it_goes_on_from_its_state(settings, tmp_path):
    """A new loss of its state, as plain tensors, and copies draw what it draws; another seed doesn't."""
    f, y = problem()
    loss = create("ensloss", seed=3, **settings)
    for _ in range(3):
        loss(f, y)
    save_file(loss.state_dict(), tmp_path / "state.safetensors")
    resumed = create("ensloss", seed=3, **settings)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    others = [resumed, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]  # noqa: S301 - our own bytes

    for _ in range(4):
        expected = loss(f, y)
        assert all(torch.equal(other(f, y), expected) for other in others)
    assert create("ensloss", seed=3, **settings)(f, y) != create("ensloss", seed=4, **settings)(f, y)


def test_a_new_lambda_is_drawn_after_each_period():
    """Of the same draws a step's loss differs from that with another λ; within a period it is one."""
    loss = create("ensloss", period=2, seed=3)
    powers = [2 * float(np.random.default_rng([3, 1, period]).random()) - 1 for period in range(2)]
    f, y = problem()

    for step in range(4):
        normal = np.random.default_rng([3, 0, step]).standard_normal(int((y >= 0).sum()))
        g = of_batch(f.tolist(), y.tolist(), normal.tolist(), powers[step // 2])
        expected = g * torch.where(y == 1, 1.0, -1.0).double()
        (gradient,) = torch.autograd.grad(loss(f, y) * (y >= 0).sum(), f)
        torch.testing.assert_close(gradient, expected)


def test_neither_evaluation_nor_others_move_its_stream():
    """After eval() it is the logistic loss; torch's own generator is not touched."""
    f, y = problem()
    loss, again = create("ensloss"), create("ensloss")
    state = torch.get_rng_state()
    keep = y != IGNORE

    watched = loss.eval()(f, y)

    torch.testing.assert_close(watched, F.binary_cross_entropy_with_logits(f[keep], y[keep].double()))
    assert torch.equal(loss.train()(f, y), again(f, y))
    assert torch.equal(torch.get_rng_state(), state)


def test_ignored_elements_count_for_nothing():
    """They take no draw and have no gradient; nothing else is 0."""
    f, y = problem()
    keep = y != IGNORE
    value = create("ensloss")(f, y)

    torch.testing.assert_close(value, create("ensloss")(f[keep], y[keep]))
    assert torch.autograd.grad(value, f)[0][~keep].abs().max() == 0
    nothing = create("ensloss")(f, torch.full_like(y, IGNORE))
    assert nothing == 0
    assert torch.autograd.grad(nothing, f)[0].abs().max() == 0
    assert create("ensloss").count(y) == keep.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_setting
def test_extreme_logits_stay_finite(dtype, settings):
    """±1e4, equal ones and a single one; losses are float32."""
    f = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0, 0.0], dtype=dtype, requires_grad=True)
    loss = create("ensloss", reduction="none", **settings)
    for rows in (slice(None), slice(1)):
        values = loss(f[rows], torch.tensor([0, 0, 1, 1, 0, 1])[rows])

        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert torch.autograd.grad(values.sum(), f)[0].isfinite().all()


def test_weights_and_shapes():
    """A weight multiplies an element and counts in the mean; leading axes are kept."""
    f, y = problem()
    weight = torch.rand(64, dtype=torch.float64)
    values = create("ensloss", reduction="none")(f, y)

    found = create("ensloss")(f, y, weight=weight)

    torch.testing.assert_close(found, (values * weight).sum() / weight[y != IGNORE].sum())
    assert create("ensloss", reduction="none")(f.reshape(8, 8), y.reshape(8, 8)).shape == (8, 8)
    assert declarations()["ensloss"].flags == ("random", "unmonitored", "whole-batch")


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(3), torch.tensor([0, 1, 2]), "targets must be 0, 1 or ignore_index=-100"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 1]), r"logits \(3, 2\) must be \(3,\)"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, message):
    """By name."""
    with pytest.raises(UserError, match=message):
        create("ensloss")(logits, targets)
