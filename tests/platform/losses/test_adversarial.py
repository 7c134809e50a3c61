"""The smooth adversarial comp-sum losses: their attack, their bound, their special cases."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossworks.entries.methods.adversarial import margins, projected_ascent, smooth_comp_sum
from lossworks.losses import create

SLUG = "smooth-adversarial-comp-sum"


def problem(n=6, d=4, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(d, 8), torch.nn.Tanh(), torch.nn.Linear(8, k)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=g)
    x = torch.randn(n, d, dtype=torch.float64, generator=g)
    return model, x, torch.randint(0, k, (n,), generator=g)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_without_an_attack_it_is_the_comp_sum_loss(tau):
    """At ν = 0 and ρ = 1; and at γ = 0, where nothing moves."""
    model, x, y = problem()
    expected = create("comp-sum", tau=tau, reduction="none")(model(x), y)
    generator = torch.Generator().manual_seed(0)

    for settings in ({"nu": 0.0}, {"radius": 0.0}):
        found = create(SLUG, tau=tau, **settings).values(model, x, y, generator)
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-6)


def test_the_attack_stays_in_the_ball_and_finds_its_corner():
    """For a linear objective the best point is a corner, whatever the start; no parameter gets a gradient."""
    model, x, _ = problem()
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    g = torch.Generator().manual_seed(0)

    found = projected_ascent(lambda z: z @ w, x, 0.3, steps=10, step_size=0.075, generator=g)

    torch.testing.assert_close(found, x + 0.3 * w.detach().sign())
    assert w.grad is None
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_steps_find_more_and_the_same_seed_the_same():
    """The loss under attack is above that at random points."""
    model, x, y = problem(n=50)

    def loss(steps):
        entry = create(SLUG, radius=0.2, steps=steps)
        return entry.values(model, x, y, torch.Generator().manual_seed(0)).mean().item()

    assert loss(10) > loss(0)
    assert loss(10) == loss(10)


def test_its_gradient_trains_the_model():
    """Through the clean and the attacked logits; a step lowers it."""
    model, x, y = problem(n=40)
    entry = create(SLUG, radius=0.1, nu=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    curve = []
    for _ in range(15):
        value = entry.values(model, x, y, torch.Generator().manual_seed(1)).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        curve.append(value.item())

    assert curve[-1] < curve[0] - 0.1


@given(
    seed=st.integers(0, 10_000),
    tau=st.sampled_from([0.0, 0.7, 1.0, 1.4]),
    rho=st.floats(0.3, 3),
    k=st.integers(2, 6),
)
def test_it_is_above_the_margin_loss_at_every_perturbed_input(seed, tau, rho, k):
    """With ν = √(K−1)/ρ, for any two rows of logits."""
    g = torch.Generator().manual_seed(seed)
    here, there = 3 * torch.randn(2, 1, k, dtype=torch.float64, generator=g)
    y = torch.zeros(1, dtype=torch.int64)
    others = margins(there, y)[:, 1:]
    u = (1 - others / rho).clamp(0, 1).sum(1)
    margin_loss = torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)
    moved = (margins(there, y) - margins(here, y)).norm(dim=1)

    bound = smooth_comp_sum(here, y, tau, rho) + math.sqrt(k - 1) / rho * moved
    assert (margin_loss <= bound + 1e-9).all()


def test_extremes_stay_finite():
    """Logits of ±1e4, one class, and an attack that moves nothing."""
    z = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    values = smooth_comp_sum(z, torch.zeros(2, dtype=torch.int64), 0.5, 1.0)

    assert values.isfinite().all()
    assert torch.autograd.grad(values.sum(), z)[0].isfinite().all()
    assert smooth_comp_sum(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), 1.0, 1.0).tolist() == [0, 0]


def test_half_precision_is_read_in_float32():
    """Its value is that of the same numbers in float32."""
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.tensor([0, 1, 2, 3, 0])

    assert torch.equal(smooth_comp_sum(z, y, 1.0, 0.7), smooth_comp_sum(z.float(), y, 1.0, 0.7))
