"""A row's numbers have the same bits alone, in any batch, at any place and on any rank."""

import random

import pytest
import torch

from lossworks.errors import UserError
from lossworks.head import (
    ExpectedLogit,
    Gathered,
    LogSumExp,
    TeacherExpectedLogit,
    linear_cross_entropy,
    linear_log_probabilities,
    linear_row_loss,
    linear_row_statistics,
)
from lossworks_testing.batch_invariance import row_numbers
from lossworks_testing.ranks import run_ranks

NAMES = ("target", "logsumexp", "mean", "sum-of-squares", "variance", "expected")
SIZES = (
    (1, 5, 10),
    (7, 16, 97),
    (95, 9, 1000),
    (96, 33, 1024),
    (97, 64, 1500),
    (200, 100, 3000),
    (300, 256, 5),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
SHAPES = [(*sizes, dtype) for dtype in DTYPES for sizes in SIZES][:20]
"""Every third one in each run of the tests, the others among the slow ones."""


def problem(n, d, v, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    e, c, b = (torch.randn(shape, generator=g).to(dtype) for shape in ((n, d), (v, d), (v,)))
    y = torch.randint(0, v, (n,), generator=g)
    y[torch.rand(n, generator=g) < 0.1] = -100
    return e, c, b, y


def focal(target, lse):
    return (1 - (target - lse).exp()) ** 2 * (lse - target)


def every_number(e, c, b, y):
    """Return what a row gets from every function, each (N, …), ∂E among it."""
    leaf = e.clone().requires_grad_()
    options = {"batch_invariant": True}
    losses, lse = linear_cross_entropy(
        *(leaf, c, y, b), reduction="none", return_lse=True, label_smoothing=0.1, z_loss=0.1, **options
    )
    candidates = torch.stack([y.clamp(min=0), torch.zeros_like(y)], -1)
    some = torch.arange(len(c)) % 3 != 1
    found = linear_row_statistics(
        *(leaf, c, y, b),
        statistics=[*NAMES, Gathered(candidates), LogSumExp(0.7, some), ExpectedLogit(2.0)],
        softcap=20.0,
        **options,
    )
    logs = linear_log_probabilities(leaf, c, candidates, b, **options)
    own = [losses, lse, *found, logs]
    sums = [losses.sum(), lse.sum(), sum(x.double().sum() for x in found), logs.sum()]
    sums.append(linear_cross_entropy(leaf, c, y, b, reduction="sum", **options))
    sums.append(linear_row_loss(leaf, c, y, focal, b, **options))
    gradients = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in sums]
    return [x.detach() for x in (*own, *gradients)]


@pytest.mark.parametrize(
    ("n", "d", "v", "dtype"),
    [pytest.param(*shape, marks=[pytest.mark.slow] if at % 3 else []) for at, shape in enumerate(SHAPES)],
)
def test_a_row_has_the_same_bits_in_any_batch(n, d, v, dtype):
    """Alone, in another order, among a third of the rows, and where the rows lie elsewhere in memory."""
    e, c, b, y = problem(n, d, v, dtype)
    whole = every_number(e, c, b, y)
    rng = random.Random(n * v)
    order = list(range(n))
    rng.shuffle(order)
    apart = torch.zeros(n + 1, d + 3).to(dtype)[1:, 3:]
    batches = [[order[0]], order, order[: n // 3 + 1]]
    for batch in batches:
        index = torch.tensor(batch)
        apart[: len(index)] = e[index]
        for rows in (e[index], apart[: len(index)]):
            part = every_number(rows, c, b, y[index])
            for mine, theirs in zip(part, whole, strict=True):
                assert mine.equal(theirs[index])


def test_it_is_the_same_loss():
    e, c, b, y = problem(50, 16, 30, torch.float64)
    for reduction in ("mean", "sum", "none"):
        leaves = [x.clone().requires_grad_() for x in (e, c, b)]
        both = [
            linear_cross_entropy(*leaves[:2], y, leaves[2], reduction=reduction, batch_invariant=invariant)
            for invariant in (False, True)
        ]
        torch.testing.assert_close(*both)
        torch.testing.assert_close(*(torch.autograd.grad(x.sum(), leaves) for x in both))


def test_two_ranks_give_the_bits_of_one(tmp_path_factory):
    """Rows that are spread over ranks, as data are."""
    alone, spread = (run_ranks(n, row_numbers, folder=tmp_path_factory.mktemp("ranks")) for n in (1, 2))

    assert alone[0] == [number for pair in zip(*spread, strict=True) for number in pair]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"filter_eps": 0.01}, "batch_invariant=True can't be combined with filter_eps=0.01"),
        ({"impl": "reference"}, "batch_invariant=True can't be combined with impl='reference'"),
        ({"batch_invariant": 1}, "batch_invariant=1 must be True or False"),
    ],
)
def test_what_looks_at_other_rows_is_refused_by_name(options, says):
    e, c, b, y = problem(4, 3, 5, torch.float32)
    with pytest.raises(UserError, match=says):
        linear_cross_entropy(e, c, y, b, **({"batch_invariant": True} | options))
    with pytest.raises(UserError, match="TeacherExpectedLogit can't be combined with batch_invariant=True"):
        linear_row_statistics(e, c, y, statistics=[TeacherExpectedLogit(e, c)], batch_invariant=True)
