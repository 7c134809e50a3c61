"""Row statistics without logits against their definitions on dense logits, and what stands on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.head import (
    ExpectedLogit,
    Gathered,
    LogSumExp,
    TeacherExpectedLogit,
    linear_log_probabilities,
    linear_row_statistics,
    linear_top_k,
    row_statistics,
)
from lossworks.head.cpu import backend as cpu
from lossworks.head.cpu.tile_sizes import TileSizes

IGNORE = -100


def problem(n=7, d=4, v=9, *, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    e, c = (torch.randn(size, d, generator=g, dtype=dtype).requires_grad_() for size in (n, v))
    b = torch.randn(v, generator=g, dtype=dtype).requires_grad_()
    y = torch.randint(0, v, (n,), generator=g)
    y[torch.rand(n, generator=g) < 0.2] = IGNORE
    return e, c, y, b


@pytest.fixture(autouse=True)
def _tiny_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "choose_tile_sizes", lambda *_, keep, filtered: TileSizes(3, 2, keep))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 9),
    softcap=st.sampled_from([None, 2.0]),
    offset=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_statistic_matches_its_definition(n, v, softcap, offset, bias, seed):
    """Values and all gradients, the temperature's and the offset's among them, at once."""
    e, c, y, b = problem(n, 4, v, seed=seed)
    g = torch.Generator().manual_seed(seed)
    margin = torch.randn(n, dtype=torch.float64, generator=g).requires_grad_() if offset else None
    temperatures = (torch.rand(n, dtype=torch.float64, generator=g) + 0.5).requires_grad_()
    some = torch.rand(v, generator=g) > 0.4
    some[0] = True
    statistics = [
        *("target", "logsumexp", "mean", "sum-of-squares", "variance", "expected"),
        LogSumExp(temperatures),
        LogSumExp(0.5, some),
        ExpectedLogit(0.5, some),
        Gathered(torch.randint(0, v, (n, 3), generator=g)),
    ]
    if not offset:
        teacher = (torch.randn(size, 3, dtype=torch.float64, generator=g) for size in (n, v))
        statistics.append(TeacherExpectedLogit(*teacher, softcap=4.0, temperature=2.0))
        statistics.append("predicted")
    options = {"statistics": statistics, "softcap": softcap, "target_offset": margin}
    linear, dense = (
        linear_row_statistics(e, c, y, b if bias else None, **options, impl=impl)
        for impl in ("cpu", "reference")
    )
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=g) for x in dense]
    leaves = [x for x in (e, c, b if bias else None, margin, temperatures) if x is not None]
    gradients = [
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(found, weights, strict=True)), leaves)
        for found in (linear, dense)
    ]

    torch.testing.assert_close(linear, dense)
    torch.testing.assert_close(*gradients)


def test_gradcheck_of_the_passes():
    """Finite differences agree, for a statistic of each kind that takes a pass."""
    e, c, y, b = problem(5, 3, 4)
    margin = torch.randn(5, dtype=torch.float64, requires_grad=True)
    temperature = torch.full((5,), 0.7, dtype=torch.float64, requires_grad=True)

    def total(e, c, b, margin, temperature):
        statistics = [
            "target",
            "mean",
            "sum-of-squares",
            "variance",
            LogSumExp(temperature),
            ExpectedLogit(2.0),
        ]
        return linear_row_statistics(e, c, y, b, statistics=statistics, softcap=3.0, target_offset=margin)

    assert torch.autograd.gradcheck(total, (e, c, b, margin, temperature))


def test_a_margin_is_inside_the_logsumexp():
    """ArcFace-like: the margin changes the target's logit in the sum, not only beside it."""
    e, c, y, b = problem()
    margin = torch.full((7,), -0.5, dtype=torch.float64)
    target, lse = linear_row_statistics(e, c, y, b, target_offset=margin)
    z = (e @ c.T + b).detach()
    z[torch.arange(7), y.clamp(min=0)] -= 0.5
    keep = y != IGNORE

    torch.testing.assert_close(lse[keep], z.logsumexp(1)[keep])
    torch.testing.assert_close(target[keep], z[torch.arange(7), y.clamp(min=0)][keep])


def test_distillation_needs_no_logits_of_either_head():
    """KL(teacher, student) from statistics equals the dense one, with its gradient."""
    e, c, _, _ = problem()
    te, tc = torch.randn(7, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)
    y = torch.zeros(7, dtype=torch.int64)
    lse, cross = linear_row_statistics(e, c, y, statistics=["logsumexp", TeacherExpectedLogit(te, tc)])
    teacher_lse, teacher_mean = linear_row_statistics(te, tc, y, statistics=["logsumexp", "expected"])
    divergence = (lse - cross) - (teacher_lse - teacher_mean)
    q = (te @ tc.T).softmax(1)
    dense = (q * (q.log() - (e @ c.T).log_softmax(1))).sum(1)

    torch.testing.assert_close(divergence, dense)
    torch.testing.assert_close(
        torch.autograd.grad(divergence.sum(), (e, c)), torch.autograd.grad(dense.sum(), (e, c))
    )


def test_the_target_alone_takes_no_pass(monkeypatch):
    """It is a gathered product, with its softcap, offset and gradients."""
    monkeypatch.setattr(cpu, "row_sums", None)
    e, c, y, b = problem()
    margin = torch.randn(7, dtype=torch.float64, requires_grad=True)
    options = {"statistics": ["target"], "softcap": 2.0, "target_offset": margin}
    (linear,), (dense,) = (linear_row_statistics(e, c, y, b, **options, impl=i) for i in ("cpu", "reference"))
    leaves = (e, c, b, margin)

    torch.testing.assert_close(linear, dense)
    torch.testing.assert_close(
        torch.autograd.grad(linear.square().sum(), leaves), torch.autograd.grad(dense.square().sum(), leaves)
    )


def test_sequences_keep_their_shape():
    """Leading dimensions come back, with the gathered classes behind them."""
    e, c, y, _ = problem(8)
    lse, some = linear_row_statistics(
        e.view(2, 4, 4),
        c,
        y.view(2, 4),
        statistics=["logsumexp", Gathered(torch.zeros(2, 4, 3, dtype=torch.int64))],
    )

    assert lse.shape == (2, 4)
    assert some.shape == (2, 4, 3)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 9), v=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 99))
def test_the_most_likely_classes(n, v, k, seed):
    """They are torch's on dense log-probabilities, whatever the tiles."""
    e, c, _, b = problem(n, 4, v, seed=seed)
    k = min(k, v)
    top = linear_top_k(e, c, k, b, softcap=5.0, temperature=0.7)
    expected = (5 * ((e @ c.T + b) / 5).tanh() / 0.7).log_softmax(1).topk(k)

    torch.testing.assert_close(top.log_probabilities, expected.values)
    assert torch.equal(top.classes, expected.indices)


def test_log_probabilities_of_sampled_classes():
    """They and their gradients are the dense ones'."""
    e, c, _, b = problem()
    classes = torch.randint(0, 9, (7, 3))
    sampled = linear_log_probabilities(e, c, classes, b, temperature=0.5)
    dense = ((e @ c.T + b) / 0.5).log_softmax(1).gather(1, classes)

    torch.testing.assert_close(sampled, dense)
    torch.testing.assert_close(
        torch.autograd.grad(sampled.square().sum(), (e, c, b)),
        torch.autograd.grad(dense.square().sum(), (e, c, b)),
    )


E, C, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_row_statistics(E, C, Y, statistics=["median"]), "'median' must be one of target"),
        (
            lambda: linear_row_statistics(E, C, Y, statistics=[LogSumExp(-1.0)]),
            "temperature must be positive",
        ),
        (
            lambda: linear_row_statistics(E, C, Y, statistics=[LogSumExp(torch.ones(3))]),
            r"temperature \(3,\)",
        ),
        (
            lambda: linear_row_statistics(E, C, Y, statistics=[LogSumExp(1.0, torch.ones(4).bool())]),
            r"classes torch.bool \(4,\)",
        ),
        (
            lambda: linear_row_statistics(E, C, Y, statistics=[Gathered(torch.full((4, 1), 5))]),
            "hold 5, first in row 0",
        ),
        (
            lambda: linear_row_statistics(E, C, Y, statistics=[TeacherExpectedLogit(E[:2], C)]),
            "the teacher has 2 rows and 5 classes, the student 4 and 5",
        ),
        (lambda: linear_row_statistics(E, C, Y, target_offset=torch.ones(3)), r"target_offset \(3,\)"),
        (lambda: row_statistics(torch.zeros(4, 5), Y + 5), "hold 5"),
        (lambda: linear_top_k(E, C, 6), r"k=6 must be in \[1, 5\]"),
        (lambda: linear_log_probabilities(E, C, Y), "classes torch.int64"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    """The error names the argument, its value and what would be right."""
    with pytest.raises(UserError, match=message):
        call()
