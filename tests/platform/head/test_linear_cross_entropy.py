"""The head against a float64 formula: values, gradients, options and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lossworks
from lossworks.errors import UserError
from lossworks.head import linear_cross_entropy
from lossworks.head.cpu import backend as cpu
from lossworks.head.cpu.tile_sizes import TileSizes
from lossworks_testing.memory import peak_bytes

IGNORE = -100


def truth(e, c, targets, bias=None, softcap=None):
    """Return the losses row by row from the definition, in float64."""
    losses = []
    for row, y in zip(e.double(), targets.tolist(), strict=True):
        z = c.double() @ row + (0 if bias is None else bias.double())
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        losses.append(torch.logsumexp(z, 0) - z[y] if y != IGNORE else z.sum() * 0)
    return torch.stack(losses)


def problem(n, d, v, *, dtype=torch.float32, bias=True, ignored=0.0, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    e = (torch.randn(n, d, generator=g) * scale).to(dtype).requires_grad_()
    c = (torch.randn(v, d, generator=g) * scale).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g).to(dtype).requires_grad_() if bias else None
    y = torch.randint(0, v, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = IGNORE
    return e, c, y, b


@pytest.fixture
def tiny_chunks(monkeypatch):
    """Make tiles of three rows and two classes, so that small problems have several and ragged last ones."""
    monkeypatch.setattr(
        cpu, "choose_tile_sizes", lambda rows, classes, *_, keep, filtered: TileSizes(3, 2, keep)
    )


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_value_and_gradients_match_the_definition(tiny_chunks, softcap, bias, ignored, reduction, impl):
    """Every reduction agrees with the row-by-row float64 formula under a random upstream gradient."""
    e, c, y, b = problem(10, 5, 7, dtype=torch.float64, bias=bias, ignored=ignored)
    leaves = [x for x in (e, c, b) if x is not None]

    actual = linear_cross_entropy(e, c, y, b, softcap=softcap, reduction=reduction, impl=impl)
    rows = truth(e, c, y, b, softcap)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (y != IGNORE).sum()}[reduction]
    upstream = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(tiny_chunks, reduction):
    """Finite differences in float64 agree with the gradients."""
    e, c, y, b = problem(5, 3, 4, dtype=torch.float64)

    assert torch.autograd.gradcheck(
        lambda *x: linear_cross_entropy(x[0], x[1], y, x[2], softcap=2.0, reduction=reduction), (e, c, b)
    )


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    v=st.integers(1, 50),
    rows=st.integers(1, 50),
    classes=st.integers(1, 60),
    kept=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_tiles_change_nothing(n, d, v, rows, classes, kept, seed):
    """Any tiles in any order give the loss and the gradients of one chunk."""
    e, c, y, b = problem(n, d, v, dtype=torch.float64, seed=seed)
    whole = linear_cross_entropy(e, c, y, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu, "choose_tile_sizes", lambda *_, keep, filtered: TileSizes(rows, classes, keep and kept)
        )
        parts = linear_cross_entropy(e, c, y, b)

    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, (e, c, b)), torch.autograd.grad(whole, (e, c, b)))


def test_float32_is_as_accurate_as_the_dense_formula():
    """Its error against float64 is at most the dense float32 formula's, plus a little."""
    e, c, y, b = problem(300, 64, 2000, scale=0.5)
    expected = torch.nn.functional.cross_entropy((e.double() @ c.double().T + b), y, reduction="none")
    dense = linear_cross_entropy(e, c, y, b, reduction="none", impl="reference")
    ours = linear_cross_entropy(e, c, y, b, reduction="none")

    assert (ours - expected).abs().max() <= (dense - expected).abs().max() + 1e-6


def test_bfloat16_is_not_worse_than_the_dense_formula():
    """In bfloat16 the gradients' errors stay below the dense formula's in the same dtype, plus 10 %."""
    e, c, y, _ = problem(200, 32, 500, dtype=torch.bfloat16, bias=False, scale=0.5)
    exact = [x.detach().double().requires_grad_() for x in (e, c)]
    expected = torch.autograd.grad(linear_cross_entropy(*exact, y, reduction="sum"), exact)
    for_impl = {
        impl: torch.autograd.grad(linear_cross_entropy(e, c, y, reduction="sum", impl=impl), (e, c))
        for impl in ("cpu", "reference")
    }

    for position in range(2):
        ours, dense = (
            (for_impl[impl][position].double() - expected[position]).norm() for impl in ("cpu", "reference")
        )
        assert ours <= 1.1 * dense


def test_autocast_keeps_the_master_weights_gradient_in_float32(tiny_chunks):
    """Under autocast products are bfloat16; losses and the gradient of a float32 C are not rounded to it."""
    e, c, y, _ = problem(64, 16, 100, bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(e, c, y)
    loss.backward()

    assert loss.dtype == torch.float32
    assert c.grad.dtype == torch.float32
    assert (c.grad != c.grad.bfloat16().float()).any()
    torch.testing.assert_close(loss, linear_cross_entropy(e, c, y), rtol=2e-2, atol=0)


def test_shift_pairs_each_row_with_a_later_target():
    """Shift s equals cutting s rows off E's end and s targets off the front, sequence by sequence."""
    e, c, _, _ = problem(12, 4, 9, bias=False)
    y = torch.randint(0, 9, (3, 4))
    shifted = linear_cross_entropy(e.view(3, 4, 4), c, y, shift=1, reduction="none")

    torch.testing.assert_close(
        shifted, linear_cross_entropy(e.view(3, 4, 4)[:, :-1], c, y[:, 1:], reduction="none")
    )


def test_an_all_ignored_batch_is_zero_with_zero_gradients():
    """Nothing to learn from is a loss of 0, not NaN."""
    e, c, y, b = problem(4, 3, 5)
    for impl in ("cpu", "reference"):
        loss = linear_cross_entropy(e, c, torch.full_like(y, IGNORE), b, impl=impl)

        assert loss.item() == 0
        assert all(grad.abs().max() == 0 for grad in torch.autograd.grad(loss, (e, c, b)))


@pytest.mark.parametrize("magnitude", [1e4, 1e-4])
def test_extreme_logits_stay_finite(magnitude):
    """Logits of ±1e4 overflow nothing, and a large common offset costs no digits."""
    e = torch.tensor([[magnitude]], requires_grad=True)
    c = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    loss = linear_cross_entropy(e, c, torch.tensor([1]))

    torch.testing.assert_close(loss, truth(e, c, torch.tensor([1]))[0].float())
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (e, c)))


def test_a_common_offset_of_the_logits_changes_nothing():
    """Adding a constant to the bias leaves loss and gradients as they are."""
    e, c, y, b = problem(6, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(linear_cross_entropy(e, c, y, b + 100), linear_cross_entropy(e, c, y, b))


def test_permuting_rows_permutes_losses():
    """The loss of a row does not depend on its place."""
    e, c, y, b = problem(9, 3, 5, ignored=0.3)
    order = torch.randperm(9)
    losses = linear_cross_entropy(e, c, y, b, reduction="none")

    torch.testing.assert_close(
        linear_cross_entropy(e[order], c, y[order], b, reduction="none"), losses[order]
    )


def test_the_result_repeats_bit_for_bit():
    """Two calls on the same inputs give the same bits."""
    e, c, y, b = problem(500, 16, 300)
    first, second = (torch.autograd.grad(linear_cross_entropy(e, c, y, b), (e, c, b)) for _ in range(2))

    assert all(torch.equal(x, z) for x, z in zip(first, second, strict=True))


def test_backward_twice_gives_the_same_gradient_twice():
    """A kept graph can be gone through again, with another upstream gradient."""
    e, c, y, _ = problem(8, 3, 5, bias=False)
    loss = linear_cross_entropy(e, c, y)
    (once,) = torch.autograd.grad(loss, e, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, e, torch.tensor(2.0))

    torch.testing.assert_close(twice, 2 * once)


def test_gradients_only_where_asked():
    """A frozen classifier costs no gradient of its own, and evaluation costs none at all."""
    e, c, y, _ = problem(8, 3, 5, bias=False)
    linear_cross_entropy(e, c.detach(), y).backward()
    with torch.no_grad():
        evaluated = linear_cross_entropy(e, c, y)

    assert e.grad is not None
    assert c.grad is None
    assert not evaluated.requires_grad


def test_peak_memory_stays_far_below_the_logits():
    """Beyond the gradients the head holds a chunk's buffer, not N x V numbers; a knob shrinks it."""
    e, c, y, _ = problem(4096, 8, 8192, bias=False)
    ours = peak_bytes(lambda: linear_cross_entropy(e, c, y).backward())
    least = peak_bytes(lambda: linear_cross_entropy(e, c, y, buffer_share=0.01).backward())
    dense = peak_bytes(lambda: linear_cross_entropy(e, c, y, impl="reference").backward())
    logits = 4096 * 8192 * 4

    assert dense >= logits
    assert ours <= logits / 6
    assert least <= logits / 40


def test_the_package_exports_the_function_however_it_is_imported():
    """The lazy attribute of the package is the function, before and after its module is imported."""
    assert lossworks.linear_cross_entropy is linear_cross_entropy
    assert lossworks.linear_cross_entropy is linear_cross_entropy
    loss = lossworks.linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 3]))
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.gpu
def test_a_gpu_gives_what_the_definition_gives():
    """On a GPU the kernels give the same."""
    e, c, y, b = problem(300, 16, 500, ignored=0.2)
    moved = [x.detach().cuda().requires_grad_() for x in (e, c, b)]
    actual = linear_cross_entropy(moved[0], moved[1], y.cuda(), moved[2])
    expected = truth(e, c, y, b).sum() / (y != IGNORE).sum()

    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(actual, moved), torch.autograd.grad(expected, (e, c, b)), strict=True
    ):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-6)


E, C, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((E, torch.zeros(5, 2), Y), {}, r"e \(4, 3\) and c \(5, 2\)"),
        ((E, C, Y[:3]), {}, r"targets \(3,\)"),
        ((E, C, Y.int()), {}, "torch.int64"),
        ((E, C, Y + 5), {}, r"targets hold 5, first in row 0 of 4; a class is in \[0, 5\)"),
        ((E, C, Y - 1), {}, "targets hold -1"),
        ((E, C, Y, torch.zeros(4)), {}, r"bias \(4,\)"),
        ((E, C.double(), Y), {}, "must agree"),
        ((E, torch.zeros(0, 3), Y), {}, "no class"),
        ((E.long(), C, Y), {}, "floating point"),
        ((E, C, Y), {"reduction": "avg"}, "reduction='avg'"),
        ((E, C, Y), {"impl": "fast"}, "impl='fast'"),
        ((E, C, Y), {"softcap": 0.0}, "softcap=0"),
        ((E, C, Y), {"shift": 4}, "shift=4"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, options, message):
    """The error names the argument, its value and what would be right."""
    with pytest.raises(UserError, match=message):
        linear_cross_entropy(*arguments, **options)
