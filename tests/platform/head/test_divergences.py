"""Divergences of two heads, and of stored log-probabilities: their definitions, limits and refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lossworks import (
    Divergence,
    TopKDivergence,
    linear_row_loss,
    linear_row_statistics,
    linear_teacher_loss,
)
from lossworks.errors import UserError
from lossworks.head.cpu import divergences as cpu
from lossworks.head.cpu.tile_sizes import TileSizes

KINDS = ("forward-kl", "reverse-kl", "jensen-shannon", "total-variation")
each_kind = pytest.mark.parametrize("kind", KINDS)


def problem(dtype=torch.float64, rows=7, classes=11, teachers=11):
    g = torch.Generator().manual_seed(0)
    e, c, b = (torch.randn(s, dtype=dtype, generator=g) for s in ((rows, 5), (classes, 5), (classes,)))
    teacher = [torch.randn(s, dtype=dtype, generator=g) for s in ((rows, 4), (teachers, 4), (teachers,))]
    y = torch.zeros(rows, dtype=torch.int64).index_fill(0, torch.tensor([2, 5]), -100)
    return [x.requires_grad_() for x in (e, c, b)], teacher, y


def by_definition(kind, z, t, temperature, weight):
    """The sums over classes, as papers write them."""
    p, q = (z / temperature).softmax(1), (t / temperature).softmax(1)
    if kind == "forward-kl":
        return (q * (q / p).log()).sum(1)
    if kind == "reverse-kl":
        return (p * (p / q).log()).sum(1)
    if kind == "total-variation":
        return (p - q).abs().sum(1) / 2
    m = weight * q + (1 - weight) * p
    return (weight * q * (q / m).log() + (1 - weight) * p * (p / m).log()).sum(1)


@pytest.fixture(params=["whole", "tiles"])
def tiles(request, monkeypatch):
    """Chunks of three rows and blocks of four classes, with ragged last ones, or one tile."""
    if request.param == "tiles":
        monkeypatch.setattr(cpu, "choose_tile_sizes", lambda *_, keep, **__: TileSizes(3, 4, keep))


@each_kind
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_values_and_gradients_are_those_of_the_definition(kind, softcap, impl, tiles):
    (e, c, b), teacher, y = problem()
    wanted = Divergence(kind, *teacher, softcap=3.0, temperature=1.7, weight=0.3)
    (found,) = linear_row_statistics(e, c, y, b, statistics=[wanted], softcap=softcap, impl=impl)
    z = e @ c.T + b
    z = z if softcap is None else softcap * (z / softcap).tanh()
    t = 3 * ((teacher[0] @ teacher[1].T + teacher[2]) / 3).tanh()
    expected = torch.where(y == -100, 0, by_definition(kind, z, t, 1.7, 0.3))
    upstream = torch.linspace(-1, 2, 7, dtype=torch.float64)

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found @ upstream, (e, c, b)),
        torch.autograd.grad(expected @ upstream, (e, c, b)),
        rtol=1e-9,
        atol=1e-11,
    )


@each_kind
def test_equal_heads_do_not_diverge(kind):
    (e, c, b), _, y = problem()
    itself = Divergence(kind, e.detach(), c.detach(), b.detach())
    (found,) = linear_row_statistics(e, c, y, b, statistics=[itself])

    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-12)


@each_kind
def test_narrow_inputs_are_summed_in_float32(kind):
    """As near to the truth of the rounded inputs as float32 allows, also under autocast."""
    (e, c, b), teacher, y = problem(torch.float32)
    e, c, b, *teacher = (x.detach().bfloat16() for x in (e, c, b, *teacher))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = linear_row_statistics(e, c, y, b, statistics=[Divergence(kind, *teacher)])
    z, t = e.double() @ c.double().T + b.double(), teacher[0].double() @ teacher[1].double().T + teacher[2]
    expected = torch.where(y == -100, 0, by_definition(kind, z, t, 1.0, 0.5))

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@each_kind
@pytest.mark.parametrize(("classes", "teachers"), [(11, 16), (16, 11)])
def test_padding_of_either_head_is_in_neither_softmax(kind, classes, teachers):
    (e, c, b), teacher, y = problem(classes=classes, teachers=teachers)
    padded = Divergence(kind, *teacher, classes=11)
    plain = Divergence(kind, teacher[0], teacher[1][:11], teacher[2][:11])
    (found,) = linear_row_statistics(e, c, y, b, statistics=[padded])
    (expected,) = linear_row_statistics(e, c[:11], y, b[:11], statistics=[plain])

    torch.testing.assert_close(found, expected)
    of_c, of_b = torch.autograd.grad(found.sum(), (c, b))
    assert not of_c[11:].any()
    assert not of_b[11:].any()


@each_kind
def test_a_class_without_any_probability(kind):
    """A bias of −∞ in both heads, as masks of vocabularies are made."""
    (e, c, b), teacher, y = problem()
    with torch.no_grad():
        b[3] = teacher[2][3] = -torch.inf
    (found,) = linear_row_statistics(e, c, y, b, statistics=[Divergence(kind, *teacher)])
    left = [0, 1, 2, *range(4, 11)]
    plain = Divergence(kind, teacher[0], teacher[1][left], teacher[2][left])
    (expected,) = linear_row_statistics(e, c[left], y, b[left], statistics=[plain])

    torch.testing.assert_close(found, expected)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (e, c)))


@each_kind
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_stored_log_probabilities_have_the_rest_as_one_class(kind, impl):
    (e, c, b), teacher, y = problem()
    log_q = ((teacher[0] @ teacher[1].T + teacher[2]) / 0.8).log_softmax(1)
    best = log_q.topk(4)
    stored = TopKDivergence(kind, best.values, best.indices, temperature=0.8, weight=0.3)
    (found,) = linear_row_statistics(e, c, y, b, statistics=[stored], impl=impl)
    log_p = ((e @ c.T + b) / 0.8).log_softmax(1).gather(1, best.indices)
    both = [torch.cat([x, (1 - x.exp().sum(1, keepdim=True)).log()], 1) for x in (log_p, best.values)]
    expected = torch.where(y == -100, 0, by_definition(kind, *both, 1.0, 0.3))

    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), (e, c, b)), torch.autograd.grad(expected.sum(), (e, c, b))
    )


@each_kind
def test_all_classes_stored_leave_no_rest(kind):
    """To float32's rounding, and with finite gradients."""
    (e, c, b), teacher, y = problem(torch.float32)
    log_q = (teacher[0] @ teacher[1].T + teacher[2]).log_softmax(1)
    every = torch.arange(11).expand(7, -1)
    (found,) = linear_row_statistics(e, c, y, b, statistics=[TopKDivergence(kind, log_q, every)])
    (whole,) = linear_row_statistics(e, c, y, b, statistics=[Divergence(kind, *teacher)])

    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (e, c, b)))


@each_kind
@pytest.mark.parametrize("bare", [False, True], ids=["biases", "no bias"])
@pytest.mark.parametrize("temperature", [1.7, 0.6])
def test_a_loss_of_the_divergence_and_the_label_is_folded_into_one_pass(kind, bare, temperature, tiles):
    """Value and gradients of any formula of a row's own numbers, weighted; the teacher has a softcap."""
    (e, c, b), teacher, y = problem()
    y = torch.where(y == -100, -100, torch.tensor([3, 0, 1, 10, 4, 2, 9]))
    if bare:
        b, teacher[2] = None, None
    weight = torch.tensor([1.0, 0.0, 2.0, -0.5, 1.0, 3.0, 0.7], dtype=torch.float64)

    def formula(target, lse, divergence):
        return 0.3 * (lse - target) * (1 + divergence) + divergence.square()

    wanted = Divergence(kind, *teacher, softcap=3.0, temperature=1.7, weight=0.3)
    found = linear_teacher_loss(*(e, c, y, wanted, formula, b), temperature=temperature, token_weight=weight)
    z, t = (x @ w.T + (0 if v is None else v) for x, w, v in ((e, c, b), teacher))
    d = by_definition(kind, z, 3 * (t / 3).tanh(), 1.7, 0.3)
    lse = temperature * (z / temperature).logsumexp(1)
    values = formula(z.gather(1, y.clamp(min=0)[:, None]).squeeze(1), lse, d)
    expected = torch.where(y == -100, 0, values * weight).sum()
    inputs = [x for x in (e, c, b) if x is not None]

    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(2 * found, inputs),
        torch.autograd.grad(2 * expected, inputs),
        rtol=1e-8,
        atol=1e-10,
    )
    torch.testing.assert_close(linear_teacher_loss(e, c, y, wanted, bias=b), d[y != -100].sum())


@each_kind
def test_what_is_folded_is_what_the_statistics_give(kind):
    """With a softcap, and with narrow weights, it is made of them."""
    (e, c, b), teacher, y = problem(torch.float32)
    for dtype, softcap in ((torch.float32, 2.0), (torch.bfloat16, None)):
        own = [x.detach().to(dtype).requires_grad_() for x in (e, c, b)]
        wanted = Divergence(kind, *(x.to(dtype) for x in teacher))
        found = linear_teacher_loss(*own[:2], y, wanted, bias=own[2], softcap=softcap)
        (each,) = linear_row_statistics(*own[:2], y, own[2], statistics=[wanted], softcap=softcap)

        torch.testing.assert_close(found, each.sum())
        torch.testing.assert_close(*(torch.autograd.grad(value, own) for value in (found, each.sum())))


def test_a_folded_loss_costs_one_product_more_than_cross_entropy():
    """That with the teacher's classes; a term of cross-entropy at another temperature costs none."""
    e, c, teacher = torch.randn(32, 8), torch.randn(50, 8), (torch.randn(32, 8), torch.randn(50, 8))
    y = torch.zeros(32, dtype=torch.int64)

    def products(loss, *wanted):
        inputs = [x.clone().requires_grad_() for x in (e, c)]
        with FlopCounterMode(display=False) as counter:
            loss(*inputs, y, *wanted).backward()
        return counter.get_total_flops() / (2 * 32 * 50 * 8)

    wanted = Divergence("reverse-kl", *teacher, temperature=2.0)
    plain = products(linear_row_loss, lambda z, lse: lse - z)

    assert products(linear_teacher_loss, wanted) == plain + 1
    assert products(linear_teacher_loss, wanted, lambda z, lse, d: lse - z + d) == plain + 1


E, C, Y = torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("statistic", "options", "says"),
    [
        (Divergence("kl", E, C), {}, "kind='kl' must be one of forward-kl, reverse-kl"),
        (Divergence("jensen-shannon", E, C, weight=1.0), {}, "weight=1.0 must be between 0 and 1"),
        (Divergence("reverse-kl", E, C, temperature=0.0), {}, "temperature must be positive"),
        (Divergence("reverse-kl", E, torch.zeros(6, 3)), {}, "2 rows and 6 classes, .* classes=K takes"),
        (Divergence("reverse-kl", E, C, classes=6), {}, r"classes=6 of the teacher must be in \[1, 5\]"),
        (Divergence("reverse-kl", E, C), {"impl": "triton"}, "impl='triton' has no kernel of it"),
        (Divergence("reverse-kl", E, C), {"target_offset": E[:, 0]}, "combined with a target_offset"),
        (TopKDivergence("reverse-kl", E, Y[:, None]), {}, r"log_probabilities \(2, 3\) must be \(2, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(statistic, options, says):
    with pytest.raises(UserError, match=says):
        linear_row_statistics(E, C, Y, statistics=[statistic], **options)
