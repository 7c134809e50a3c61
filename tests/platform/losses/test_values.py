"""Losses of numbers: errors in closed form, and what every loss of this kind keeps to."""

import math

import pytest
import torch

from lossworks.errors import UserError
from lossworks.losses import create, declarations

VALUES = [slug for slug, entry in declarations().items() if entry.kind == "value"]
SETTINGS = [
    ("squared-error", {}),
    ("absolute-error", {}),
    *(("huber", {"delta": delta}) for delta in (0.3, 1.0, 5.0)),
    *(("quantile", {"levels": levels}) for levels in ([0.5], [0.1, 0.5, 0.9], [0.05, 0.7])),
]
by_setting = pytest.mark.parametrize(("slug", "settings"), SETTINGS)
by_slug = pytest.mark.parametrize("slug", VALUES)


def problem(loss, n=9, *, dtype=torch.float64, seed=0):
    """Return outputs, targets of which one is unknown, and what else the loss needs."""
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, loss.outputs, dtype=dtype, generator=g).requires_grad_()
    y = 2 * torch.randn(n, dtype=dtype, generator=g)
    y[3] = math.nan
    context = {}
    if "discounts" in loss.requires:
        context["next_probabilities"] = torch.rand(n, loss.outputs, dtype=dtype, generator=g).softmax(-1)
        context["discounts"] = torch.rand(n, dtype=dtype, generator=g)
    return f, y, context


def rows_of(context, rows):
    return {name: values[rows] for name, values in context.items()}


def error(slug, settings, f, y):
    """Return one value's loss in plain numbers."""
    u = f[0] - y
    if slug == "squared-error":
        return u * u
    if slug == "absolute-error":
        return abs(u)
    if slug == "huber":
        delta = settings["delta"]
        return u * u / 2 if abs(u) <= delta else delta * (abs(u) - delta / 2)
    sides = [t * (y - q) if y > q else (1 - t) * (q - y) for t, q in zip(settings["levels"], f, strict=True)]
    return sum(sides) / len(sides)


@by_setting
def test_values_are_those_of_the_formula(slug, settings):
    """And gradients those of finite differences."""
    loss = create(slug, reduction="none", **settings)
    f, y, _ = problem(loss)
    expected = [
        0.0 if math.isnan(target) else error(slug, settings, row, target)
        for row, target in zip(f.tolist(), y.tolist(), strict=True)
    ]

    torch.testing.assert_close(loss(f, y), torch.tensor(expected, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda f: loss(f, y), (f,))


@by_slug
def test_an_unknown_target_counts_for_nothing(slug):
    """NaN or weight 0: no loss, no gradient, not counted; where nothing is known the loss is 0."""
    loss = create(slug)
    f, y, context = problem(loss)
    known = ~y.isnan()
    spoilt = f.detach().clone()
    spoilt[3] = math.nan
    spoilt.requires_grad_()

    value = loss(spoilt, y, **context)
    (gradient,) = torch.autograd.grad(value, spoilt)
    weighted = loss(f, y.nan_to_num(), weight=known.double(), **context)
    nothing = loss(f, torch.full_like(y, math.nan), **context)

    torch.testing.assert_close(value, loss(f[known], y[known], **rows_of(context, known)))
    torch.testing.assert_close(weighted, value)
    assert gradient.isfinite().all()
    assert gradient[3].abs().max() == 0
    assert nothing == 0
    assert torch.autograd.grad(nothing, f)[0].abs().max() == 0
    assert loss.count(y) == len(y) - 1


@by_slug
def test_reductions_agree(slug):
    """Weighted sum, mean and unreduced values, whole and in unequal parts; targets have no gradient."""
    none, total, mean = (create(slug, reduction=how) for how in ("none", "sum", "mean"))
    f, y, context = problem(none)
    weight = torch.rand(len(y), dtype=torch.float64)
    values = none(f, y, weight=weight, **context)

    parts = [
        total(f[rows], y[rows], weight=weight[rows], **rows_of(context, rows))
        for rows in (slice(2), slice(2, None))
    ]
    torch.testing.assert_close(total(f, y, weight=weight, **context), values.sum())
    torch.testing.assert_close(sum(parts), values.sum())
    torch.testing.assert_close(mean(f, y, weight=weight, **context), values.sum() / weight[~y.isnan()].sum())
    assert not total(f.detach(), y.requires_grad_(), **context).requires_grad


@by_slug
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_read_in_float32(slug, dtype):
    """With any leading axes; predictions are float32, too."""
    loss = create(slug, reduction="none")
    f, y, context = problem(loss, n=8, dtype=torch.float32)
    rounded = f.detach().to(dtype)
    folded = {name: t.reshape(2, 4, *t.shape[1:]) for name, t in context.items()}

    values = loss(rounded.reshape(2, 4, -1), y.reshape(2, 4), **folded)

    torch.testing.assert_close(values, loss(rounded.float(), y, **context).reshape(2, 4))
    assert values.dtype == torch.float32
    assert loss.decode(rounded.reshape(2, 4, -1)).shape == (2, 4)
    assert loss.decode(rounded).dtype == torch.float32


def test_the_least_quantile_loss_is_at_the_quantiles():
    """Of a sample whose quantiles are known: the gradient changes its sign there."""
    y = torch.arange(1.0, 101.0, dtype=torch.float64) - 0.5
    loss = create("quantile", levels=[0.1, 0.5, 0.9], reduction="sum")

    def slopes(shift):
        f = torch.tensor([10.0, 50.0, 90.0], dtype=torch.float64) + shift
        f.requires_grad_()
        return torch.autograd.grad(loss(f.expand(100, 3), y), f)[0]

    torch.testing.assert_close(slopes(0.0), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (slopes(-1.0) < 0).all()
    assert (slopes(1.0) > 0).all()


def test_quantiles_do_not_cross_and_the_middle_one_is_the_prediction():
    """Outputs in any order give them ascending; the level nearest 1/2 is decoded."""
    loss = create("quantile", levels=[0.1, 0.4, 0.9])
    outputs = torch.tensor([[3.0, 1.0, 2.0], [-1.0, 0.0, 1.0]])

    assert loss.quantiles(outputs).tolist() == [[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]]
    assert loss.decode(outputs).tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("slug", "options", "call", "message"),
    [
        ("quantile", {"levels": [0.5, 0.5]}, None, r"levels=\[0.5, 0.5\] must be one or more, and ascend"),
        ("quantile", {"levels": []}, None, "must be one or more"),
        ("quantile", {}, (torch.zeros(2, 1), torch.zeros(2)), r"outputs \(2, 1\) must be \(..., 3\)"),
        ("huber", {}, (torch.zeros(2), torch.zeros(2)), r"outputs \(2,\) must be \(..., 1\)"),
        ("squared-error", {}, (torch.zeros(2, 1), torch.zeros(2, 1)), r"targets \(2, 1\) must be \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(slug, options, call, message):
    """By name, when it is made or called."""
    with pytest.raises(UserError, match=message):
        create(slug, **options)(*call)
