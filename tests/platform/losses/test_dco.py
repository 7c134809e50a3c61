"""Losses of whole answers: the sheet's values, sequences and steps, and the estimator of pass@k."""

from fractions import Fraction
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossworks.entries.losses.sequences.dco import coverage_loss, pass_at
from lossworks.errors import UserError
from lossworks.losses import create


def test_the_values_of_the_fact_sheet():
    """And the weight F = −∂ℓ/∂s."""
    s = torch.tensor([-2.0, -6.0], dtype=torch.float64, requires_grad=True)
    losses = torch.stack([coverage_loss(s[0], 4), coverage_loss(s[1], 64)])
    (slope,) = torch.autograd.grad(losses.sum(), s)

    torch.testing.assert_close(
        losses, torch.tensor([0.8186495, 1.9182438], dtype=torch.float64), atol=1e-7, rtol=0
    )
    torch.testing.assert_close(
        -slope, torch.tensor([0.7935042, 0.9238290], dtype=torch.float64), atol=1e-7, rtol=0
    )


@given(s=st.floats(-2000, 0), samples=st.sampled_from([1, 2, 16, 256, 4096]))
def test_losses_and_weights_are_finite_everywhere(s, samples):
    """From impossible answers to certain ones; the weight is within [0, 1], and the loss at N = 1 is −s."""
    log_p = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    loss = coverage_loss(log_p, samples)
    (slope,) = torch.autograd.grad(loss, log_p)

    assert loss.isfinite()
    assert -1 - 1e-6 <= slope <= 0  # of numbers near 1 less numbers near 1, where s is tiny
    if samples == 1:
        assert loss.item() == pytest.approx(-s, rel=1e-9, abs=2e-12)


def test_the_weight_falls_with_the_probability():
    """From 1 for p far below 1/N to 0 at p = 1, across the change of formula at N·p = 1e-3."""
    p = torch.logspace(-9, 0, 500, dtype=torch.float64)
    s = p.log().requires_grad_()
    (slope,) = torch.autograd.grad(coverage_loss(s, 64).sum(), s)

    assert (slope.diff() > -1e-9).all()
    assert slope[0] == pytest.approx(-1, abs=1e-6)
    assert slope[-1] == 0


def test_a_sequence_is_reduced_before_the_nonlinearity():
    """The loss of a sequence is that of the sum of its tokens; ignored tokens and sequences don't count."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, 6, dtype=torch.float64, generator=g)
    y = torch.randint(0, 6, (3, 4), generator=g)
    y[0, 2:], y[2] = -100, -100
    log_p = z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1) * (y >= 0)
    loss = create("dco", samples=8, reduction="none")

    expected = coverage_loss(log_p.sum(1), 8) * torch.tensor([1, 1, 0])
    torch.testing.assert_close(loss(z, y), expected)
    torch.testing.assert_close(create("dco", samples=8)(z, y), expected[:2].mean())
    assert loss.count(y) == 2
    mean = coverage_loss(log_p.sum(1) / torch.tensor([2, 4, 1]), 8)[:2]
    torch.testing.assert_close(create("dco", samples=8, length_mean=True, reduction="none")(z, y)[:2], mean)


def test_with_and_without_logits_agree_with_steps_named():
    """Segments of unequal length, over the batch; values and gradients."""
    g = torch.Generator().manual_seed(1)
    e = torch.randn(2, 5, 3, dtype=torch.float64, generator=g).requires_grad_()
    c = torch.randn(7, 3, dtype=torch.float64, generator=g).requires_grad_()
    y = torch.randint(0, 7, (2, 5), generator=g)
    steps = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 3]])
    loss = create("dco-step", samples=4, reduction="none")
    upstream = torch.randn(4, dtype=torch.float64, generator=g)

    dense, linear = loss(e @ c.T, y, segments=steps), loss.linear(e, c, y, segments=steps)

    assert dense.shape == (4,)
    torch.testing.assert_close(dense, linear)
    torch.testing.assert_close(
        *(torch.autograd.grad(found @ upstream, (e, c), retain_graph=True) for found in (dense, linear))
    )
    with pytest.raises(UserError, match="dco-step: needs the input segments"):
        loss(e @ c.T, y)
    with pytest.raises(UserError, match="no input step; did you mean"):
        loss(e @ c.T, y, step=steps)


@given(data=st.data(), n=st.integers(1, 40))
def test_pass_at_k_is_the_exact_fraction(data, n):
    """Counted with integers."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))

    assert pass_at(n, c, k) == pytest.approx(float(1 - Fraction(comb(n - c, k), comb(n, k))), abs=1e-12)


def test_pass_at_k_of_many_samples_and_of_wrong_numbers():
    """No overflow; what can't be is refused."""
    assert pass_at(100_000, 50, 256) == pytest.approx(1 - (1 - 50 / 100_000) ** 256, abs=1e-3)
    with pytest.raises(UserError, match="samples=3, correct=4, k=1"):
        pass_at(3, 4, 1)
