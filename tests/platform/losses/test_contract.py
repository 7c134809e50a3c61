"""What every row loss of the catalogue keeps to, from its declaration alone."""

import json
import math
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lossworks.errors import UserError
from lossworks.losses import Declaration, create, declarations
from lossworks.losses.interface import of_members
from lossworks_testing.formulas import FORMULAS, of_rows

ROWS = [slug for slug, entry in declarations().items() if entry.kind == "row"]
IGNORE = -100

# Settings besides the defaults, so that every branch of a formula is met.
SETTINGS = [
    *((slug, {}) for slug in ROWS),
    ("cross-entropy", {"label_smoothing": 0.2}),
    ("cross-entropy", {"label_smoothing": 0.2, "class_weight": [0.3, 2.0, 1.0, 0.0, 3.0]}),
    ("log-z", {"coefficient": 0.3, "label_smoothing": 0.1}),
    ("log-z", {"coefficient": 0.3, "alone": True}),
    *(("comp-sum", {"tau": tau}) for tau in (0.0, 0.5, 1 - 1e-6, 1.7, 2.0)),
    *(("ldr", {"temperature": t, "margin": c}) for t, c in ((0.1, 2.0), (10.0, 0.0))),
    *(("ldr", {"normalisation": how}) for how in ("abs-mean", "softplus-mean")),
    *(("aldr-kl", {"normalisation": how, "temperature": 1.0}) for how in ("none", "softplus-mean")),
    ("spherical-z-loss", {"a": 3.0, "b": 0.0}),
    *((slug, {"classes": c}) for slug in ("dice", "self-adjusting-dice") for c in ("all", "but-first")),
    ("dice", {"square": False, "gamma": 0.1}),
    ("self-adjusting-dice", {"alpha": 1.0, "square": True, "classes": "all"}),
    ("tversky", {"alpha": 0.7, "beta": 0.2, "classes": "all"}),
    ("tversky", {"alpha": 0.2, "beta": 0.9, "gamma": 1e-3}),
]
by_setting = pytest.mark.parametrize(("slug", "settings"), SETTINGS)
by_slug = pytest.mark.parametrize("slug", ROWS)


def problem(n=6, d=4, k=5, *, dtype=torch.float64, seed=0):
    """Return E, C, targets with one ignored row, and a bias."""
    g = torch.Generator().manual_seed(seed)
    e, c, b = (torch.randn(*shape, dtype=dtype, generator=g) for shape in ((n, d), (k, d), (k,)))
    y = torch.randint(0, k, (n,), generator=g)
    y[1] = IGNORE
    return e.requires_grad_(), c.requires_grad_(), y, b.requires_grad_()


def logits_of(e, c, b):
    return (e @ c.T + b).detach().requires_grad_()


@by_setting
def test_values_are_those_of_the_paper_with_and_without_logits(slug, settings):
    """Linear, dense and the formula in plain numbers agree, with gradients for a random upstream one."""
    e, c, y, b = problem()
    loss = create(slug, reduction="none", **settings)
    z = e @ c.T + b
    upstream = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = of_rows(slug, z, y, loss.settings())

    dense, linear = loss(z, y), loss.linear(e, c, y, b)

    # Tighter than the default, which float32 rounding of a hyperparameter would pass.
    torch.testing.assert_close(dense, expected, rtol=2e-8, atol=1e-9)
    torch.testing.assert_close(linear, expected, rtol=2e-8, atol=1e-9)
    torch.testing.assert_close(
        *(torch.autograd.grad(found @ upstream, (e, c, b), retain_graph=True) for found in (linear, dense))
    )


@by_slug
def test_models_trained_at_once_may_differ_in_hyperparameters(slug):
    """Parts of a batch with hyperparameters of their own have the values and gradients they have alone."""
    declared = {p.name: p for p in declarations()[slug].hyperparameters}
    alone = [create(slug, reduction="none")]
    for share in (0.0, 0.6, 1.0):  # the ends, and what lies between
        spaces = {name: declared[name].search for name in alone[0].per_row if declared[name].search}
        settings = {name: low + share * (high - low) for name, (low, high) in spaces.items()}
        alone.append(create(slug, reduction="none", **settings))
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(len(alone), 6, 5, dtype=torch.float64, generator=g)).requires_grad_()
    y = torch.randint(0, 5, z.shape[:2], generator=g)
    y[:, 1] = IGNORE
    upstream = torch.randn(*z.shape[:2], dtype=torch.float64, generator=g)

    together = of_members(alone, torch.float64)(z, y)
    expected = torch.stack([loss(*part) for loss, part in zip(alone, zip(z, y, strict=True), strict=True)])

    assert alone[0].per_row, "every row loss of the catalogue has a hyperparameter that may differ"
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(
        *(
            torch.autograd.grad((found * upstream).sum(), z, retain_graph=True)
            for found in (together, expected)
        )
    )


@by_setting
def test_reductions_agree(slug, settings):
    """Sum and mean of the unreduced values with weights, their gradients, and unequal parts of a batch."""
    e, c, y, b = problem()
    weight = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    none, total, mean = (create(slug, reduction=how, **settings) for how in ("none", "sum", "mean"))

    values = none.linear(e, c, y, b, weight=weight)
    summed = total.linear(e, c, y, b, weight=weight)
    parts = sum(total.linear(e[s], c, y[s], b, weight=weight[s]) for s in (slice(1), slice(1, 6)))

    torch.testing.assert_close(summed, values.sum())
    torch.testing.assert_close(parts, summed)
    torch.testing.assert_close(
        *(torch.autograd.grad(3 * found, (e, c, b), retain_graph=True) for found in (summed, values.sum()))
    )
    divisors = (
        weight if not settings.get("class_weight") else weight * none._class_weights(c, 5)[y.clamp(min=0)]
    )
    expected = values.sum() / divisors[y != IGNORE].sum()
    torch.testing.assert_close(mean.linear(e, c, y, b, weight=weight), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean(e @ c.T + b, y, weight=weight), expected, rtol=1e-6, atol=1e-6)


@by_slug
def test_gradients_are_those_of_finite_differences(slug):
    """In float64, at the defaults and with the steps of aldr-kl off, whose λ counts as a constant."""
    e, c, y, b = problem()
    loss = create(slug, reduction="none", **({"steps": 0} if slug == "aldr-kl" else {}))

    assert torch.autograd.gradcheck(lambda z: loss(z, y), (logits_of(e, c, b),))
    assert torch.autograd.gradcheck(lambda e, c, b: loss.linear(e, c, y, b), (e, c, b))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@by_slug
def test_ignored_rows_have_no_gradient_and_count_for_nothing(slug, impl):
    """Nor does a batch of nothing else, which is 0 and not NaN."""
    e, c, y, b = problem()
    loss = create(slug)
    keep = y != IGNORE

    value = loss.linear(e, c, y, b, impl=impl)
    (of_e,) = torch.autograd.grad(value, e)
    none = loss.linear(e, c, torch.full_like(y, IGNORE), b, impl=impl)
    empty = torch.autograd.grad(none, (e, c), materialize_grads=True)

    torch.testing.assert_close(value, loss.linear(e[keep], c, y[keep], b, impl=impl))
    assert of_e[~keep].abs().max() == 0
    assert of_e[keep].abs().max() > 0
    assert none == 0
    assert all(gradient.abs().max() == 0 for gradient in empty)
    assert loss.count(y) == 5


@by_slug
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(slug, dtype):
    """±1e4 on and off the target, one class, one row; losses are float32."""
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = create(slug, reduction="none")
    for logits, y in ((z, [0, 0, 2]), (z, [1, 2, IGNORE]), (z[:1, :1], [0])):
        values = loss(logits, torch.tensor(y))
        (gradient,) = torch.autograd.grad(values.sum(), z)

        assert values.dtype == torch.float32
        assert values.isfinite().all()
        assert gradient.isfinite().all()


@by_slug
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_the_plain_formula_in_it(slug, dtype):
    """The inputs' rounding is left out: both read the same rounded logits."""
    e, c, y, b = problem(n=32, k=50)
    z = (e @ c.T + b).detach().to(dtype)
    expected = of_rows(slug, z.double(), y, create(slug).settings())

    values = create(slug, reduction="none")(z, y).double()

    # λ log K, which is taken off a logsumexp of that size, is 39 in aldr-kl.
    scale = expected.abs().clamp(min=1.0)
    assert ((values - expected).abs() / scale).max() < 1e-5


@by_slug
def test_the_order_of_rows_and_what_the_paper_leaves_free_change_nothing(slug):
    """Permuted rows give permuted values; declared invariances hold, and a shift that is not is seen."""
    e, c, y, b = problem()
    z, loss = logits_of(e, c, b).detach(), create(slug, reduction="none")
    values, order = loss(z, y), torch.tensor([3, 1, 5, 0, 2, 4])
    invariances = declarations()[slug].invariances

    torch.testing.assert_close(loss(z[order], y[order]), values[order])
    shifted = torch.allclose(loss(z + 3.0, y), values)
    scaled = torch.allclose(loss(2.5 * z, y), values)
    assert shifted == ("shift" in invariances)
    assert scaled == ("scale" in invariances or slug == "aldr-kl")


@by_slug
def test_compiled_it_has_the_same_value(slug):
    """Traced by torch.compile, without the cost of its code generator."""
    e, c, y, b = problem()
    loss, z = create(slug), (e @ c.T + b).detach()

    torch.testing.assert_close(torch.compile(loss, backend="aot_eager")(z, y), loss(z, y))


@pytest.mark.parametrize("slug", list(declarations()))
def test_what_is_out_of_range_is_refused_by_name(slug):
    """One value beyond each limit, one of another type, and a name that is not there."""
    for parameter in declarations()[slug].hyperparameters:
        wrong = [
            parameter.type != "text" and "no such",
            parameter.ge is not None and parameter.ge - 1,
            parameter.gt,
            math.nan,
        ]
        wrong += [parameter.le is not None and parameter.le + 1, parameter.lt]
        for value in wrong:
            if value is None or value is False:
                continue
            given = [value] if parameter.type == "numbers" else value
            with pytest.raises(UserError, match=f"{slug}: {parameter.name}="):
                create(slug, **{parameter.name: given})
    with pytest.raises(UserError, match=f"{slug}: no hyperparameter lamda"):
        create(slug, lamda=1.0)


@pytest.mark.parametrize("slug", list(declarations()))
def test_a_declaration_survives_the_way_through_json_and_pickle(slug):
    """And every corner of its search space makes a loss."""
    entry = declarations()[slug]
    space = entry.search_space()

    assert Declaration.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    for pick in (0, -1):
        corner = {
            name: dimension["values"][pick]
            if dimension["type"] == "choice"
            else dimension[("low", "high")[pick]]
            for name, dimension in space.items()
        }
        loss = create(slug, **corner)

        again = pickle.loads(pickle.dumps(loss))  # noqa: S301 - our own bytes
        assert again.settings() == loss.settings() == entry.check(corner)


def test_what_needs_logits_is_not_computed_without():
    """The hyperparameter that needs them is named, and the way out."""
    e, c, y, b = problem()
    with pytest.raises(UserError, match="normalisation='abs-mean' needs all logits: impl='cpu' must be auto"):
        create("ldr", normalisation="abs-mean").linear(e, c, y, b, impl="cpu")


def test_the_penalty_alone_costs_no_more_than_cross_entropy():
    """As many products without logits as the loss that it is left out of, whose part it is."""
    e, c, y, b = problem(n=32, d=8, k=50)

    def products(slug, **settings):
        loss = create(slug, reduction="sum", **settings)
        with FlopCounterMode(display=False) as counter:
            loss.linear(e, c, y, b, impl="cpu").backward()
        return counter.get_total_flops()

    assert products("log-z", alone=True) == products("cross-entropy")
    both, plain = create("log-z", coefficient=0.3), create("cross-entropy")
    alone = create("log-z", coefficient=0.3, alone=True)
    torch.testing.assert_close(alone.linear(e, c, y, b), both.linear(e, c, y, b) - plain.linear(e, c, y, b))


def test_every_row_loss_has_its_formula_here():
    """A new entry without one is not tested."""
    assert set(FORMULAS) == set(ROWS)


def test_the_values_of_the_fact_sheet():
    """Row (2, 0, −1, 0.5) with label 0, recomputed independently in float64."""
    z, y = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64), torch.tensor([0])

    def value(slug: str, **settings: object) -> Tensor:
        return create(slug, **settings)(z, y)

    aldr = {"temperature": 1.0, "margin": 0.1, "alpha": 2.0, "steps": 100, "normalisation": "none"}
    found = {
        "comp-sum 0": (value("comp-sum", tau=0.0), 0.4082525),
        "comp-sum 0.5": (value("comp-sum", tau=0.5), 0.3733963),
        "comp-sum 1": (value("comp-sum"), 0.3423496),
        "comp-sum 1.7": (value("comp-sum", tau=1.7), 0.3044180),
        "comp-sum 2": (value("comp-sum", tau=2.0), 0.2899001),
        "ldr 1 0": (value("ldr", margin=0.0), -1.0439448),
        "ldr 1 0.1": (value("ldr"), -1.0139113),
        "ldr 10 0.1": (value("ldr", temperature=10.0), -1.4949211),
        "ldr 0.1 1": (value("ldr", temperature=0.1, margin=1.0), -0.1379534),
        "aldr-kl": (value("aldr-kl", **aldr), -0.9559964),
        "spherical 1 0": (value("spherical-z-loss", b=0.0), 0.2012107),
        "spherical 1 1": (value("spherical-z-loss"), 0.4736578),
        "spherical 3 .5": (value("spherical-z-loss", a=3.0, b=0.5), 0.0161432),
        "log-z": (value("log-z") - value("cross-entropy"), 5.4866e-4),
    }
    for name, (actual, expected) in found.items():
        assert actual.item() == pytest.approx(expected, abs=2e-7), name
