"""FedLEx's guidance equals the formulas, and is 1 where it could say nothing."""

import numpy as np
import pytest
import torch

from lossworks_federated.server.guidance import guidance_matrix


def moved(m=4, shape=(3, 5), seed=0):
    return torch.randn(m, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def minmax(x):
    return (x - x.min()) / (x.max() - x.min())


def robust(x):
    low, middle, high = np.percentile(x, [25, 50, 75])
    return np.clip((x - middle) / (high - low), 0, 1)


@pytest.mark.parametrize(("scaler", "scale"), [("minmax", minmax), ("robust", robust)])
def test_both_orders_of_scaling(scaler, scale):
    """Scale and average, or average and scale."""
    squares = moved().numpy() ** 2
    paper = guidance_matrix(moved(), scaler=scaler)
    reference = guidance_matrix(moved(), scaler=scaler, order="reference")

    assert paper.numpy() == pytest.approx(np.mean([scale(one) for one in squares], axis=0))
    assert reference.numpy() == pytest.approx(scale(squares.mean(0)))


def test_one_explorer_cannot_outweigh_the_others():
    """The paper's order doesn't see how large a client's steps were; the code's does."""
    larger = moved().clone()
    larger[0] *= 1000

    assert torch.allclose(guidance_matrix(larger), guidance_matrix(moved()))
    assert not torch.allclose(
        guidance_matrix(larger, order="reference"), guidance_matrix(moved(), order="reference"), atol=0.05
    )


@pytest.mark.parametrize("scaler", ["minmax", "robust"])
@pytest.mark.parametrize("order", ["paper", "reference"])
def test_what_says_nothing_is_one(scaler, order):
    """Nobody moved, all entries alike, one entry, no explorers."""
    for still in (torch.zeros(3, 2, 2), torch.full((3, 4), 0.3), torch.randn(3, 1), torch.empty(0, 2, 2)):
        found = guidance_matrix(still, order=order, scaler=scaler)
        assert torch.equal(found, torch.ones(still.shape[1:]))


def test_rescaling_keeps_the_mean_step():
    """The entries keep their proportions."""
    plain, rescaled = guidance_matrix(moved()), guidance_matrix(moved(), rescale="mean")

    assert float(rescaled.mean()) == pytest.approx(1)
    assert torch.allclose(rescaled * plain.mean(), plain)
    assert torch.equal(guidance_matrix(torch.zeros(2, 3), rescale="mean"), torch.ones(3))


def test_the_orders_differ_in_size_as_the_sheet_says():
    """Gaussian displacements of twenty clients, ten thousand entries: 0.064 and 0.34."""
    found = moved(20, (10000,))

    assert float(guidance_matrix(found).mean()) == pytest.approx(0.064, abs=0.015)
    assert float(guidance_matrix(found, order="reference").mean()) == pytest.approx(0.34, abs=0.08)
