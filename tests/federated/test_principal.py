"""FedLD's aggregation equals the paper's steps, and keeps to its edge rules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossworks_federated.server.principal_directions import principal_update


def step_by_step(g, rho, flip=False):
    """Return the update by the steps as written: project and rescale, for each client and direction."""
    m = len(g)
    values, vectors = np.linalg.eigh(g @ g.T / m)
    total, result = values.sum(), np.zeros(g.shape[1])
    for j in sorted(range(m), key=lambda q: -values[q])[: max(1, int(rho * m + 1e-9))]:
        if values[j] <= 1e-12 * total:
            continue
        direction = g.T @ vectors[:, j]
        direction = -direction if flip or (g @ direction < 0).sum() > m / 2 else direction
        for client in g:
            projection = (client @ direction) / (direction @ direction) * direction
            if np.linalg.norm(projection) > 1e-12 * np.linalg.norm(client) > 0:
                factor = values[j] / total * np.linalg.norm(client) / np.linalg.norm(projection)
                result += factor * projection / m
    return result


def random_updates(m, d, seed=0, dtype=torch.float64):
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("m", [2, 3, 5, 12, 40])
@pytest.mark.parametrize("d", [2, 10, 1000])
@pytest.mark.parametrize("rho", [0.5, 0.8, 1.0])
def test_it_equals_the_steps_of_the_paper(m, d, rho):
    """Also where there are fewer entries than clients, and whatever the signs of the directions."""
    g = random_updates(m, d, seed=m + d)
    found = principal_update(g, rho).numpy()

    for flip in (False, True):
        assert found == pytest.approx(step_by_step(g.numpy(), rho, flip=flip), rel=1e-7, abs=1e-9)


@given(m=st.integers(1, 9), d=st.integers(1, 30), rho=st.floats(0.05, 1.0), seed=st.integers(0, 10**6))
def test_it_is_finite_and_no_longer_than_the_clients(m, d, rho, seed):
    """With a client that sends zero; scaling all updates scales the result, their order doesn't matter."""
    g = random_updates(m, d, seed=seed)
    g[0] = 0 if m > 1 else g[0]
    found = principal_update(g, rho)

    assert found.isfinite().all()
    assert float(found.norm()) <= float(g.norm(dim=1).mean()) * (1 + 1e-9)
    assert torch.allclose(principal_update(8 * g, rho), 8 * found, atol=1e-9)
    assert torch.allclose(principal_update(g.flip(0), rho), found, atol=1e-7)


def test_simple_updates():
    """Agreement is kept, opposition cancels, one client is taken as it is, nothing gives nothing."""
    g = random_updates(1, 6)[0]

    assert torch.allclose(principal_update(g.expand(5, 6)), g)
    assert torch.allclose(principal_update(g[None]), g)
    assert torch.allclose(principal_update(torch.stack((g, -g))), torch.zeros(6, dtype=g.dtype), atol=1e-12)
    assert torch.allclose(principal_update(torch.stack((g, g, -g))), g / 3)
    assert torch.equal(principal_update(torch.zeros(4, 6)), torch.zeros(6))
    assert principal_update(torch.randn(3, 2, 5)).shape == (2, 5)
    assert principal_update(torch.randn(3, 1)).shape == (1,)


def test_a_small_direction_counts_where_large_ones_cancel():
    """Two clients that oppose each other add nothing: what is left of float32 updates is the small rest."""
    g = torch.zeros(3, 50)
    g[0, 0], g[1, 0], g[2, 1] = 100.0, -100.0, 0.05

    found = principal_update(g, rho=1.0).double()
    wanted = torch.from_numpy(step_by_step(g.double().numpy(), 1.0))

    assert float(found.norm()) > 0
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_float32_is_near_float64(scale):
    """At the size of a layer, however large the updates are."""
    g = (random_updates(12, 4000, seed=3) + random_updates(1, 4000, seed=4)) * scale
    exact = principal_update(g)

    assert torch.allclose(
        principal_update(g.float()).double(), exact, rtol=1e-3, atol=2e-5 * float(exact.norm())
    )


def test_disagreement_shortens_it_and_rescaling_gives_the_length_back():
    """Noise three times the signal: still in the mean's direction, at less than half of its length."""
    signal = random_updates(1, 5000, seed=1) / math.sqrt(5000)
    g = signal + 3 * random_updates(10, 5000, seed=2) / math.sqrt(5000)
    mean, found, rescaled = g.mean(0), principal_update(g), principal_update(g, rescale="norm")

    cosine = float(torch.nn.functional.cosine_similarity(mean, found, dim=0))
    assert cosine > 0.9
    assert float(found.norm() / mean.norm()) < 0.6
    assert float(rescaled.norm()) == pytest.approx(float(mean.norm()), rel=1e-9)
    assert torch.allclose(rescaled / rescaled.norm(), found / found.norm())
