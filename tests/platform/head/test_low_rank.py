"""A classifier that is trained in a low-rank part alone: the formed one's numbers, and it is never made."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lossworks.errors import UserError
from lossworks.head import (
    ExpectedLogit,
    Gathered,
    LogSumExp,
    LowRankClassifier,
    QuantizedClassifier,
    TeacherExpectedLogit,
    linear_cross_entropy,
    linear_log_probabilities,
    linear_row_loss,
    linear_row_statistics,
    linear_top_k,
)
from lossworks.head.cpu import backend as cpu
from lossworks.head.cpu.tile_sizes import TileSizes

IGNORE = -100
NAMES = ("target", "logsumexp", "mean", "sum-of-squares", "variance", "expected", "predicted")


def problem(n=7, d=6, v=9, r=2, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (v, d), (r, d), (v, r), (v,))
    e, c, a, b, bias = (torch.randn(shape, generator=g, dtype=dtype) for shape in shapes)
    y = torch.randint(0, v, (n,), generator=g)
    y[1] = IGNORE
    return [x.requires_grad_() for x in (e, a, b, bias)], c, y


@pytest.fixture(autouse=True, params=[True, False], ids=["kept", "twice"])
def _tiny_tiles(request, monkeypatch):
    plan = lambda *_, keep, filtered: TileSizes(3, 2, keep and request.param)  # noqa: E731
    monkeypatch.setattr(cpu, "choose_tile_sizes", plan)


def focal(target, lse):
    return (1 - (target - lse).exp()) ** 2 * (lse - target)


def statistics(e, c, y, bias):
    candidates = torch.arange(3 * len(e)).reshape(len(e), 3) % 9
    asked = [*NAMES, LogSumExp(0.7), ExpectedLogit(2.0), Gathered(candidates)]
    return sum(
        (x * (k + 1)).sum() for k, x in enumerate(linear_row_statistics(e, c, y, bias, statistics=asked))
    )


FUNCTIONS = {
    "mean": linear_cross_entropy,
    "no bias": lambda e, c, y, b: linear_cross_entropy(e, c, y),
    "rows": lambda e, c, y, b: linear_cross_entropy(e, c, y, b, reduction="none").square().sum(),
    "options": lambda e, c, y, b: linear_cross_entropy(
        *(e, c, y, b), label_smoothing=0.1, z_loss=0.1, class_weight=torch.linspace(0, 2, 9), temperature=0.7
    ),
    "softcap": lambda e, c, y, b: linear_cross_entropy(e, c, y, b, softcap=2.0, label_smoothing=0.1),
    "soft targets": lambda e, c, y, b: linear_cross_entropy(e, c, torch.full((7, 9), 1 / 9).double(), b),
    "filtered, nothing left out": lambda e, c, y, b: linear_cross_entropy(e, c, y, b, filter_eps=0.0),
    "row loss": lambda e, c, y, b: linear_row_loss(e, c, y, focal, b),
    "statistics": statistics,
    "log-probabilities": lambda e, c, y, b: linear_log_probabilities(e, c, y.clamp(min=0)[:, None], b).sum(),
    "reference": lambda e, c, y, b: linear_cross_entropy(e, c, y, b, impl="reference"),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("kind", ["plain", "quantised", "after dropout"])
def test_value_and_gradients_are_those_of_the_formed_classifier(function, kind):
    (e, a, b, bias), c, y = problem()
    weight = QuantizedClassifier.of(c) if kind == "quantised" else c
    if kind == "after dropout":
        dropped = e * (torch.rand(e.shape, generator=torch.Generator().manual_seed(1)) > 0.3)
        found = function(torch.cat([e, dropped @ a.T], 1), LowRankClassifier(weight, None, b), y, bias)
        # The same logits by a formed classifier of twice as many features.
        expected = function(torch.cat([e, dropped], 1), torch.cat([c, b @ a], 1), y, bias)
    else:
        low = LowRankClassifier(weight, a, b, 0.5)
        found, expected = function(e, low, y, bias), function(e, low.formed(), y, bias)
    leaves = (e, a, b, bias)
    options = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
    gradients = [torch.autograd.grad(value, leaves, **options) for value in (found, expected)]

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


def test_the_likeliest_classes_are_those_of_the_formed_classifier():
    (e, a, b, bias), c, _ = problem()
    low = LowRankClassifier(c, a, b, 3.0)

    torch.testing.assert_close(linear_top_k(e, low, 4, bias), linear_top_k(e, low.formed(), 4, bias))


def test_eight_bits_are_off_by_half_a_step():
    c = torch.cat([torch.randn(20, 16), torch.zeros(1, 16)])
    quantised = QuantizedClassifier.of(c)
    formed = LowRankClassifier(quantised, torch.ones(1, 16), torch.zeros(21, 1)).formed()

    assert quantised.values.dtype == torch.int8
    assert ((formed - c).abs() <= c.abs().amax(1, keepdim=True) / 254 + 1e-6).all()


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that an operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, tuple) else (found,):
            if isinstance(x, torch.Tensor) and not x._is_view():
                self.numbers = max(self.numbers, x.numel())
        return found


@pytest.mark.parametrize("quantised", [False, True])
def test_nothing_as_large_as_the_classifier_is_made(quantised, monkeypatch):
    """Neither C + B·A, nor its gradient, nor a copy of C, forward and backward."""
    monkeypatch.setattr(cpu, "choose_tile_sizes", lambda *_, keep, filtered: TileSizes(8, 16, keep))
    (e, a, b, _), c, y = problem(20, 24, 200, 2, dtype=torch.float32)
    low = LowRankClassifier(QuantizedClassifier.of(c) if quantised else c, a, b)
    with _Largest() as largest:
        linear_cross_entropy(e, low, y).backward()

    assert 0 < largest.numbers < c.numel() / 2


def test_what_does_not_fit_is_refused_by_name():
    (e, a, b, _), c, y = problem()
    q = QuantizedClassifier.of(c)
    cases = [
        (LowRankClassifier(c, a[:0], b[:, :0]), r"c.b \(9, 0\) must be \(9, r\) with a rank r in \[1, 6\]"),
        (LowRankClassifier(c, a, torch.zeros(9, 7)), r"c.b \(9, 7\) must be .* r in \[1, 6\]"),
        (LowRankClassifier(c, a, b[:4]), r"c.b \(4, 2\) must be \(9, r\)"),
        (LowRankClassifier(c, a[:1], b), r"c.a \(1, 6\) must be \(2, 6\)"),
        (LowRankClassifier(c, a.tolist(), b), "c.a is a list; it must be a torch.Tensor"),
        (LowRankClassifier(c[:, :3], a[:, :3], b), r"e \(7, 6\) must be \(..., 3\)"),
        (LowRankClassifier(c.clone().requires_grad_(), a, b), "c.weight requires a gradient"),
        (LowRankClassifier(c, None, b), r"e \(7, 6\) must be \(..., 8\), as c has 6 features and rank 2"),
        (LowRankClassifier(c.long(), a, b), "c.weight is torch.int64; it must be floating point"),
        (LowRankClassifier(QuantizedClassifier(q.values, q.scale[:2]), a, b), r"\(9,\)"),
    ]
    for low, says in cases:
        with pytest.raises(UserError, match=says):
            linear_cross_entropy(e, low, y)
    with pytest.raises(UserError, match="TeacherExpectedLogit can't be combined with a LowRankClassifier"):
        linear_row_statistics(
            e, LowRankClassifier(c, a, b), y, statistics=[TeacherExpectedLogit(e.detach(), c)]
        )
