"""Weights of any sign, rows that weigh nothing, biases of −∞, and scales that come after the pass."""

import pytest
import torch
import torch.nn.functional as F

from lossworks import linear_cross_entropy, linear_row_loss, linear_row_statistics
from lossworks.errors import UserError
from lossworks.head import Gathered, TeacherExpectedLogit
from lossworks.head.cpu.tiles import product_dtype
from lossworks.losses import create, declarations

WEIGHTS = {
    "positive sum": [2.0, -1.0, 1.0, 0.5],
    "negative sum": [-2.0, 1.0, -1.0, 0.5],
    "sum 0": [1.0, -1.0, 1.0, -1.0],
    "with zeros": [0.0, -1.0, 0.0, 3.0],
}
LINEAR = [slug for slug in declarations("losses") if hasattr(create(slug), "linear")]
SLUGS = ("cross-entropy", "ldr", "comp-sum", "log-z")


def problem(dtype=torch.float64, rows=4, classes=10):
    g = torch.Generator().manual_seed(0)
    e = torch.randn(rows, 8, dtype=dtype, generator=g)
    c = torch.randn(classes, 8, dtype=dtype, generator=g)
    return e, c, torch.randint(0, classes, (rows,), generator=g)


def expected(values, w, reduction):
    total = (w * values).sum()
    return total if reduction == "sum" else total / w.sum() if w.sum() else 0 * total


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_head_takes_weights_of_any_sign(impl, reduction, weights):
    """Value and gradients are those of the formula; 0 where a mean's divisor is."""
    e, c, y = problem()
    w = torch.tensor(weights, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (e, c)]
    own = linear_cross_entropy(*leaves, y, token_weight=w, reduction=reduction, impl=impl)
    plain = [x.clone().requires_grad_() for x in (e, c)]
    want = expected(F.cross_entropy(plain[0] @ plain[1].T, y, reduction="none"), w, reduction)

    torch.testing.assert_close(own, want)
    torch.testing.assert_close(torch.autograd.grad(own, leaves), torch.autograd.grad(want, plain))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("slug", SLUGS)
def test_losses_take_weights_of_any_sign(slug, reduction, weights):
    """Dense and without the logits alike."""
    e, c, y = problem()
    w = torch.tensor(weights, dtype=torch.float64)
    want = expected(create(slug, reduction="none")(e @ c.T, y), w, reduction)
    loss = create(slug, reduction=reduction)

    torch.testing.assert_close(loss(e @ c.T, y, weight=w), want)
    torch.testing.assert_close(loss.linear(e, c, y, weight=w), want)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_class_weights_of_any_sign(sign):
    """As torch's where they are positive; the formula holds for negative ones, too."""
    e, c, y = problem()
    w = sign * torch.linspace(0.5, 2, len(c), dtype=torch.float64)
    own = linear_cross_entropy(e, c, y, class_weight=w)

    torch.testing.assert_close(
        own,
        F.cross_entropy(e @ c.T, y, reduction="sum") * 0
        + (w[y] * F.cross_entropy(e @ c.T, y, reduction="none")).sum() / w[y].sum(),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_weighs_nothing_may_hold_anything(bad):
    """Neither loss nor gradient sees it."""
    e, c, y = problem()
    e[1] = bad
    w = torch.tensor([1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    for call in (
        lambda e, c: linear_cross_entropy(e, c, y, token_weight=w),
        lambda e, c: linear_row_loss(e, c, y, lambda z, lse: (lse - z) ** 2, token_weight=w),
        lambda e, c: create("ldr").linear(e, c, y, weight=w),
    ):
        leaves = [x.clone().requires_grad_() for x in (e, c)]
        value = call(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        kept = [0, 2, 3]
        assert value.isfinite()
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[0][1].any()
        assert gradients[0][kept].any()


def test_a_class_that_a_bias_rules_out_has_no_part_in_the_expected_logit():
    """Σ p z with p = 0 and z = −∞ is that of the other classes, and so are its gradients."""
    e, c, y = problem()
    bias = torch.zeros(10, dtype=torch.float64)
    bias[9] = -torch.inf
    y = y % 9
    leaves = [x.clone().requires_grad_() for x in (e, c)]
    (own,) = linear_row_statistics(*leaves, y, bias, statistics=("expected",))
    few = [e.clone().requires_grad_(), c[:9].clone().requires_grad_()]
    (want,) = linear_row_statistics(*few, y, statistics=("expected",))
    gradients = torch.autograd.grad(own.sum(), leaves)
    theirs = torch.autograd.grad(want.sum(), few)

    torch.testing.assert_close(own, want)
    torch.testing.assert_close(gradients[0], theirs[0])
    torch.testing.assert_close(gradients[1][:9], theirs[1])
    assert not gradients[1][9].any()


def test_bad_options_are_refused_in_words():
    """An infinite cap would be NaN, and a column would be spread over all rows."""
    e, c, y = problem()
    with pytest.raises(UserError, match="softcap=inf must be positive and finite in float32, or None"):
        linear_cross_entropy(e, c, y, softcap=float("inf"))
    with pytest.raises(UserError, match=r"returns \(4, 1\) for \(4,\) rows; it must return one number a row"):
        linear_row_loss(e, c, y, lambda z, lse: (lse - z)[:, None])


SCALE = 65536.0


@pytest.mark.parametrize("rows", [512, 8192])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_gradient_scaler_finds_what_it_scales(autocast, rows):
    """fp16 gradients of a mean of many rows are no worse than plain torch's, and hardly any is 0."""
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(rows, 32, generator=g), 0.02 * torch.randn(2048, 32, generator=g)
    y = torch.randint(0, 2048, (rows,), generator=g)
    e, c = e.half(), c if autocast else c.half()
    exact = [x.double().requires_grad_() for x in (e, c)]
    F.cross_entropy(exact[0] @ exact[1].T, y).backward()

    def errors(call):
        leaves = [x.clone().requires_grad_() for x in (e, c)]
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = call(*leaves)
        (loss * SCALE).backward()
        found = [x.grad.double() / SCALE for x in leaves]
        assert [x.grad.dtype for x in leaves] == [e.dtype, c.dtype]
        return [float((f - x.grad).norm() / x.grad.norm()) for f, x in zip(found, exact, strict=True)]

    plain = errors(lambda e, c: F.cross_entropy(F.linear(e, c).float(), y))
    for call in (
        lambda e, c: linear_cross_entropy(e, c, y),
        lambda e, c: linear_cross_entropy(e, c, y, reduction="sum") / rows,
        lambda e, c: create("ldr", temperature=1.0, margin=0.0).linear(e, c, y),
    ):
        own = errors(call)
        assert all(ours <= max(2 * theirs, 1e-3) for ours, theirs in zip(own, plain, strict=True)), (
            own,
            plain,
        )


@pytest.mark.parametrize("name", ["target", "logsumexp", "mean", "sum-of-squares", "variance", "expected"])
def test_statistics_are_float32_under_autocast(name):
    """And those of operands rounded once; matrix units of bfloat16 round logits, too, as in plain torch."""
    g = torch.Generator().manual_seed(0)
    e, c = torch.randn(16, 64, generator=g), torch.randn(50, 64, generator=g)
    y = torch.randint(0, 50, (16,), generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (own,) = linear_row_statistics(e, c, y, statistics=(name,))
    (want,) = linear_row_statistics(e.bfloat16().double(), c.bfloat16().double(), y, statistics=(name,))

    assert own.dtype == torch.float32
    tolerance = 1e-4 if product_dtype(torch.bfloat16, "cpu") == torch.float32 else 2**-7
    torch.testing.assert_close(own.double(), want, rtol=tolerance, atol=tolerance)


def test_log_probabilities_under_autocast_are_below_zero():
    """A sure row's target and logsumexp come from the same numbers."""
    e, c = 40 * torch.eye(8), torch.eye(8)
    y = torch.arange(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target, lse = linear_row_statistics(e, c, y)
    assert (target <= lse).all()


@pytest.mark.parametrize("slug", SLUGS)
def test_losses_are_had_in_inference_mode(slug):
    """Which forbids autograd, also inside."""
    e, c, y = problem(torch.float32)
    with torch.inference_mode():
        own = create(slug).linear(e, c, y)
    assert own.item() == pytest.approx(create(slug)(e @ c.T, y).item(), rel=1e-5)


def test_a_row_loss_gives_its_gradients_away():
    """While the loss still has a name; a second backward pass computes them again."""
    e, c, y = problem()
    leaves = [x.clone().requires_grad_() for x in (e, c)]
    value = linear_row_loss(*leaves, y, lambda z, lse: (lse - z) ** 2)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert value.grad_fn.gradients is None
    second = torch.autograd.grad(2 * value, leaves)

    torch.testing.assert_close([2 * g for g in first], list(second))


def test_kernels_are_not_started_for_no_row():
    """A batch in which nothing counts has the loss 0."""
    e, c, _ = problem(torch.float32)
    none = torch.full((4,), -100)
    leaves = [x.clone().requires_grad_() for x in (e, c)]
    value = linear_cross_entropy(*leaves, none, impl="triton")
    assert value.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(value, leaves))


STATISTICS = {
    "target": "target",
    "logsumexp": "logsumexp",
    "mean": "mean",
    "sum-of-squares": "sum-of-squares",
    "variance": "variance",
    "expected": "expected",
    "gathered": Gathered(torch.tensor([[0, 1]] * 4)),
    "teacher": TeacherExpectedLogit(
        torch.ones(4, 3, dtype=torch.float64).index_fill(0, torch.tensor([1]), torch.nan),
        torch.arange(30, dtype=torch.float64).reshape(10, 3) / 10,
    ),
}


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS.keys())
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_whatever_an_ignored_row_holds_reaches_no_gradient(impl, softcap, statistic):
    """NaN there is as good as 0: 0·NaN would be NaN in every sum over rows."""

    def of(blank):
        e, c, y = problem()
        e[1], y[1] = blank, -100
        leaves = [x.requires_grad_() for x in (e, c)]
        (value,) = linear_row_statistics(*leaves, y, statistics=[statistic], softcap=softcap, impl=impl)
        return value.detach(), *torch.autograd.grad(value.square().sum(), leaves)

    torch.testing.assert_close(of(torch.nan), of(0.0), rtol=0, atol=0)


@pytest.mark.parametrize("how", ["ignored", "weight"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("slug", LINEAR)
def test_whatever_a_row_without_weight_holds_reaches_no_gradient(slug, impl, how):
    """Of every loss that takes a linear head."""

    def of(blank):
        loss = create(slug)
        generator = torch.Generator().manual_seed(0)
        made = loss.problem(4, generator)
        targets, given = made.target.clone(), dict(made.context)
        shape = (*made.prediction.shape[:-1], 5)
        e = torch.randn(shape, dtype=torch.float64, generator=generator).index_fill(
            0, torch.tensor([1]), blank
        )
        c = torch.randn(made.prediction.shape[-1], 5, dtype=torch.float64, generator=generator)
        if how == "ignored":
            targets[1] = -100
        else:
            values = create(slug, reduction="none")(made.prediction, targets, **given)
            given["weight"] = torch.ones_like(values)
            given["weight"][{4: [1], 8: [2, 3]}[len(values)]] = 0
        leaves = [x.requires_grad_() for x in (e, c)]
        chosen = {"impl": impl} if loss.kind == "row" and not loss.needs_logits else {}
        value = loss.linear(*leaves, targets, **chosen, **given)
        return value.detach(), *torch.autograd.grad(value, leaves)

    torch.testing.assert_close(of(torch.nan), of(0.0), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ignore_index": None}, "ignore_index=None must be a whole number"),
        ({"ignore_index": 2.5}, "ignore_index=2.5 must be a whole number"),
        ({"shift": 1.0}, "shift=1.0 must be a whole number"),
        ({"temperature": torch.tensor(2.0)}, r"temperature is a Tensor \(\); it must be a number.*LogSumExp"),
        ({"z_loss": torch.tensor(0.1)}, "z_loss is a Tensor"),
        ({"label_smoothing": "0.1"}, "label_smoothing='0.1' must be a number"),
        ({"softcap": True}, "softcap=True must be a number"),
        ({"softcap": 1e39}, r"softcap=1e\+39 must be positive and finite in float32"),
        ({"temperature": 1e-40}, "temperature=1e-40 must be positive and finite in float32"),
        ({"token_weight": [1.0, 2.0, 3.0, 4.0]}, "token_weight is a list; it must be a torch.Tensor"),
        (
            {"bias": torch.zeros(10, dtype=torch.float64).to_sparse()},
            "bias is torch.sparse_coo; it must be dense",
        ),
        ({"buffer_share": None}, "buffer_share=None must be a number"),
        ({"vocab_parallel": 2}, "vocab_parallel=2 must be a process group"),
    ],
)
def test_what_is_no_number_is_refused_by_name(options, says):
    e, c, y = problem()
    with pytest.raises(UserError, match=says):
        linear_cross_entropy(e, c, y, **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_slope_of_a_saturated_softcap_has_all_its_digits(reduction):
    """1 − tanh² cancels, in plain float32 to two digits of the gradient or none."""
    g = torch.Generator().manual_seed(0)
    e = torch.rand((64, 1), generator=g) + 6  # all logits are at ±s but for e⁻¹²
    c = torch.randn((256, 1), generator=g).sign()
    y = torch.randint(0, 256, (64,), generator=g)

    def gradient(loss, dtype):
        leaf = e.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(leaf, c.to(dtype)), leaf)[0].double()

    def plain(e, c):
        return F.cross_entropy(torch.tanh(e @ c.T), y)

    def ours(e, c):
        return linear_cross_entropy(e, c, y, softcap=1.0, reduction=reduction).mean()

    true = gradient(plain, torch.float64)
    error, others = ((gradient(loss, torch.float32) - true).norm() / true.norm() for loss in (ours, plain))
    assert error < 1e-5 < others


def test_a_row_without_weight_has_no_logsumexp():
    """It is 0 as in ignored rows, and NaN in the row reaches nothing."""
    e, c, y = problem()
    e[2] = torch.nan
    leaves = [x.requires_grad_() for x in (e, c)]
    weight = torch.ones(4, dtype=torch.float64).index_fill(0, torch.tensor([2]), 0)
    loss, lse = linear_cross_entropy(*leaves, y, token_weight=weight, return_lse=True)

    assert lse[2] == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss + lse.sum(), leaves))
