"""HL-Gauss, two-hot and categorical TD: a head of bins that stands for a value."""

import math
from itertools import pairwise

import pytest
import torch

from lossworks.errors import UserError
from lossworks.losses import create

SETTINGS = [
    ("hl-gauss", {"bins": 5}),
    ("hl-gauss", {"bins": 8, "sigma_ratio": 2.0, "v_min": -1.0, "v_max": 3.0}),
    ("two-hot", {"bins": 5}),
    ("two-hot", {"bins": 2, "v_min": 0.0, "v_max": 1.0}),
    ("categorical-td", {"bins": 6, "v_min": -2.0, "v_max": 2.0}),
]
SLUGS = ["hl-gauss", "two-hot", "categorical-td"]
by_setting = pytest.mark.parametrize(("slug", "settings"), SETTINGS)


def problem(slug, bins, n=7, *, dtype=torch.float64, seed=0):
    """Return logits, targets within and beyond the range, and what else the loss needs."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, bins, dtype=dtype, generator=g).requires_grad_()
    y = 2 * torch.randn(n, dtype=dtype, generator=g)
    y[0], y[1] = 1e3, -1e3
    context = {}
    if slug == "categorical-td":
        context["next_probabilities"] = torch.randn(n, bins, dtype=dtype, generator=g).softmax(-1)
        context["discounts"] = torch.rand(n, dtype=dtype, generator=g)
    return z, y, context


def phi(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def gauss(y, bins, low, high, ratio):
    width = (high - low) / bins
    y, sigma = min(max(y, low), high), ratio * width
    edges = [low + width * i for i in range(bins + 1)]
    mass = [phi((b - y) / sigma) - phi((a - y) / sigma) for a, b in pairwise(edges)]
    return [m / sum(mass) for m in mass]


def two_hot(y, bins, low, high):
    y, step = min(max(y, low), high), (high - low) / (bins - 1)
    return [max(0.0, 1 - abs(y - (low + step * i)) / step) for i in range(bins)]


def distribution(loss, y, next_p=None, discount=None):
    """Return q of one target in plain numbers."""
    bins, low, high = loss.bins, loss.v_min, loss.v_max
    if loss.slug == "hl-gauss":
        return gauss(y, bins, low, high, loss.sigma_ratio)
    if loss.slug == "two-hot":
        return two_hot(y, bins, low, high)
    q = [0.0] * bins
    for j, mass in enumerate(next_p.tolist()):
        moved = y + float(discount) * (low + (high - low) / (bins - 1) * j)
        q = [a + mass * b for a, b in zip(q, two_hot(moved, bins, low, high), strict=True)]
    return q


def of_rows(loss, z, y, context):
    values = []
    for i, row in enumerate(z.tolist()):
        more = [t[i] for t in context.values()]
        log_total = math.log(sum(map(math.exp, row)))
        q = distribution(loss, y[i].item(), *more)
        values.append(-sum(a * (b - log_total) for a, b in zip(q, row, strict=True)))
    return torch.tensor(values, dtype=torch.float64)


@by_setting
def test_values_are_those_of_the_paper(slug, settings):
    """In every reduction, with weights, for targets within the range and beyond it, and in parts."""
    none, total, mean = (create(slug, reduction=how, **settings) for how in ("none", "sum", "mean"))
    z, y, context = problem(slug, none.bins)
    weight = torch.rand(len(y), dtype=torch.float64)

    values = none(z, y, weight=weight, **context)
    parts = [
        total(z[s], y[s], weight=weight[s], **{name: t[s] for name, t in context.items()})
        for s in (slice(2), slice(2, None))
    ]

    torch.testing.assert_close(values, weight * of_rows(none, z, y, context))
    torch.testing.assert_close(total(z, y, weight=weight, **context), values.sum())
    torch.testing.assert_close(sum(parts), values.sum())
    torch.testing.assert_close(mean(z, y, weight=weight, **context), values.sum() / weight.sum())
    assert none.count(y) == len(y)


@by_setting
def test_gradients_are_those_of_finite_differences(slug, settings):
    """Of every reduction, under a random upstream gradient; targets have none."""
    for how in ("none", "sum", "mean"):
        loss = create(slug, reduction=how, **settings)
        z, y, context = problem(slug, loss.bins)
        upstream = torch.randn(loss(z, y, **context).shape, dtype=torch.float64)

        assert torch.autograd.gradcheck(lambda z: loss(z, y, **context) * upstream, (z,))  # noqa: B023
        assert not loss(z.detach(), y.requires_grad_(), **context).requires_grad


@by_setting
def test_any_leading_axes_and_their_order(slug, settings):
    """Permuted elements give permuted values, a shift of the logits none."""
    loss = create(slug, reduction="none", **settings)
    z, y, context = problem(slug, loss.bins, n=6)
    values, order = loss(z, y, **context), torch.tensor([3, 1, 5, 0, 2, 4])

    torch.testing.assert_close(loss(z + 2.0, y, **context), values)
    torch.testing.assert_close(
        loss(z[order], y[order], **{name: t[order] for name, t in context.items()}), values[order]
    )
    folded = {name: t.reshape(2, 3, *t.shape[1:]) for name, t in context.items()}
    torch.testing.assert_close(loss(z.reshape(2, 3, -1), y.reshape(2, 3), **folded), values.reshape(2, 3))
    assert loss.decode(z.reshape(2, 3, -1)).shape == (2, 3)


@pytest.mark.parametrize("slug", SLUGS)
def test_inputs_of_an_unknown_target_may_be_anything(slug):
    """NaN in its next state reaches neither value nor gradient."""
    loss = create(slug, bins=5)
    z, y, context = problem(slug, 5)
    y[3] = math.nan
    keep = torch.arange(7) != 3
    kept = {name: t[keep] for name, t in context.items()}
    for values in context.values():
        values[3] = math.nan

    value = loss(z, y, **context)
    (gradient,) = torch.autograd.grad(value, z)

    torch.testing.assert_close(value, loss(z[keep], y[keep], **kept))
    assert gradient[3].abs().max() == 0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(slug, dtype):
    """±1e4, and targets of ±1e4; losses are float32."""
    loss = create(slug, bins=3, reduction="none")
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype, requires_grad=True)
    context = {}
    if slug == "categorical-td":
        context = {"next_probabilities": torch.eye(3)[:2], "discounts": torch.ones(2)}
    values = loss(z, torch.tensor([1e4, -1e4]), **context)

    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), z)[0].isfinite().all()
    assert loss.decode(z).isfinite().all()


def test_half_the_module_does_not_round_the_support():
    """Bins have no buffers that could be rounded or left on another device."""
    loss = create("hl-gauss", bins=201)
    exact = loss.support(torch.empty(0, dtype=torch.float64))

    assert torch.equal(loss.half().support(torch.empty(0, dtype=torch.float64)), exact)
    assert loss.state_dict() == {}


def test_the_histogram_of_the_fact_sheet():
    """Five bins on [−1, 1], y = 0.3, σ = 0.3."""
    loss = create("hl-gauss", bins=5, v_min=-1.0, v_max=1.0)
    q = loss.distribution(torch.tensor([0.3], dtype=torch.float64), loss.context({}))

    expected = torch.tensor([[0.0013559, 0.0469012, 0.3248418, 0.4765847, 0.1503164]], dtype=torch.float64)
    torch.testing.assert_close(q, expected, atol=1e-7, rtol=0)
    assert loss.decode(q.log()).item() == pytest.approx(0.2910419, abs=1e-7)


@pytest.mark.parametrize(("ratio", "worst"), [(0.75, 4.8e-6), (0.5, 2.3e-3), (0.25, 0.093)])
def test_decoding_a_target_gives_its_value_back(ratio, worst):
    """To so many bin widths within the range (the fact sheet's); at its end it is 0.69 of one too low."""
    loss = create("hl-gauss", sigma_ratio=ratio)
    width = 20 / 51
    y = torch.linspace(-5, 5, 2001, dtype=torch.float64)

    def error(values):
        return (loss.decode(loss.distribution(values, loss.context({})).log()) - values) / width

    assert error(y).abs().max() == pytest.approx(worst, rel=0.03)
    if ratio == 0.75:
        assert error(torch.tensor([10.0], dtype=torch.float64)).item() == pytest.approx(-0.69, abs=0.005)


def test_two_hot_keeps_the_mean():
    """Exactly, at the ends of the range too."""
    loss = create("two-hot", bins=21)
    y = torch.linspace(-10, 10, 1001, dtype=torch.float64)

    torch.testing.assert_close(loss.decode(loss.distribution(y, loss.context({})).log()), y)


def test_categorical_td_without_a_next_state_is_two_hot_of_the_reward():
    """And with γ = 1 and no reward the next state's distribution itself."""
    z, y, context = problem("categorical-td", 51)
    td = create("categorical-td")
    last = context | {"discounts": torch.zeros(7, dtype=torch.float64)}
    still = context | {"discounts": torch.ones(7, dtype=torch.float64)}

    torch.testing.assert_close(td(z, y, **last), create("two-hot")(z, y))
    q = td.distribution(torch.zeros_like(y), td.context(still))
    torch.testing.assert_close(q, context["next_probabilities"])


def test_the_least_loss_is_the_entropy_of_the_target():
    """Its gradient is 0 there, and its value isn't."""
    loss = create("hl-gauss", bins=9)
    y = torch.tensor([1.3], dtype=torch.float64)
    q = loss.distribution(y, loss.context({}))
    z = q.log().requires_grad_()

    torch.testing.assert_close(loss(z, y), -(q * q.log()).sum())
    assert torch.autograd.grad(loss(z, y), z)[0].abs().max() < 1e-15


@pytest.mark.parametrize(
    ("slug", "options", "call", "message"),
    [
        ("hl-gauss", {"v_min": 1.0, "v_max": 1.0}, None, "v_min=1 must be below v_max=1"),
        ("two-hot", {}, (torch.zeros(2, 5), torch.zeros(2)), r"outputs \(2, 5\) must be \(..., 51\)"),
        ("two-hot", {"bins": 5}, (torch.zeros(2, 5), torch.zeros(3)), r"targets \(3,\) must be \(2,\)"),
        ("categorical-td", {"bins": 5}, (torch.zeros(2, 5), torch.zeros(2)), "needs the input next_prob"),
    ],
)
def test_what_does_not_fit_is_refused(slug, options, call, message):
    """By name, when it is made or called."""
    with pytest.raises(UserError, match=message):
        create(slug, **options)(*call)
