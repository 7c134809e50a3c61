"""Betti matching as a loss: the exact values of the fact sheet, where gradients land, and what it is for."""

import numpy as np
import pytest
import torch

from lossworks.losses import create
from lossworks.metrics import betti_matching_error


def logits_of(image):
    """Return logits (1, 2, H, W) whose probabilities are exactly those of an image."""
    p = torch.as_tensor(image, dtype=torch.float64)
    z = torch.where((p > 0) & (p < 1), p.logit(), 2e4 * p - 1e4)
    return torch.stack((torch.zeros_like(z), z))[None].requires_grad_()


def targets_of(image):
    return torch.as_tensor(image).long()[None]


def ring(row=1, column=1):
    image = np.zeros((10, 16))
    image[row : row + 5, column : column + 5] = 1
    image[row + 1 : row + 4, column + 1 : column + 4] = 0
    return image


def bars(image, mask, **settings):
    """Return the part of the loss that is of bars."""
    logits, targets = logits_of(image), targets_of(mask)
    whole = create("betti-matching", alpha=1.0, **settings)(logits, targets)
    return (whole - create("map-dice")(logits, targets)).item()


@pytest.mark.parametrize(("frame", "expected"), [(False, 2), (True, 4)])
def test_two_rings_at_different_places(frame, expected):
    """Two loops without a match, and within the frame two components as well."""
    assert bars(ring(1, 1), ring(4, 10), frame=frame) == pytest.approx(expected)
    assert bars(ring(4, 10), ring(1, 1), frame=frame) == pytest.approx(expected)
    assert bars(ring(), ring(), frame=frame) == pytest.approx(0, abs=1e-12)


def test_a_ring_with_one_pixel_cut_or_weak():
    """1, and 2·0.6² = 0.72."""
    cut, weak = ring(), ring()
    cut[1, 3], weak[1, 3] = 0, 0.4

    assert bars(cut, ring(), frame=False) == pytest.approx(1)
    assert bars(weak, ring(), frame=False) == pytest.approx(0.72)


def test_the_gradient_is_that_of_the_pixels_at_births_and_deaths():
    """Of a ring with a weak pixel: there alone, to close it."""
    weak = ring()
    weak[1, 3] = 0.4
    logits, targets = logits_of(weak), targets_of(ring())

    whole = create("betti-matching", alpha=1.0)(logits, targets) - create("map-dice")(logits, targets)
    (slope,) = torch.autograd.grad(whole, logits)

    p = 0.4
    assert slope[0, 1, 1, 3].item() == pytest.approx(2 * 2 * (p - 1) * p * (1 - p))
    slope[0, :, 1, 3] = 0
    assert slope.abs().max() < 1e-12


def test_connectivity_of_the_foreground():
    """A ring whose corner is gone is whole where pixels touch at corners."""
    image = ring()
    image[1, 1] = 0

    assert bars(image, ring(), frame=False) == pytest.approx(1)
    assert bars(image, ring(), frame=False, diagonal=True) == pytest.approx(0, abs=1e-12)


def test_it_is_the_mean_over_the_classes_of_the_foreground():
    """A third class that nobody has adds the squared difference of the maxima, which is none."""
    logits, targets = logits_of(ring(1, 1)), targets_of(ring(4, 10))
    three = torch.cat((logits, torch.full_like(logits[:, :1], -1e4)), 1)

    both = create("betti-matching", alpha=1.0, frame=False)(three, targets)
    overlap = create("map-dice")(three, targets)

    assert (both - overlap).item() == pytest.approx(2 / 2)


def test_descending_on_it_closes_a_gap():
    """A ring with a weak pixel that Dice alone leaves open for long is closed, and nothing else appears."""
    image = np.where(ring() == 1, 0.9, 0.1)
    image[1, 3] = 0.2
    z = logits_of(image)[0, 1].detach().requires_grad_()
    loss = create("betti-matching", alpha=1.0)
    for _ in range(30):
        value = loss(torch.stack((torch.zeros_like(z), z))[None], targets_of(ring()))
        (slope,) = torch.autograd.grad(value, z)
        z = (z - 2 * slope).detach().requires_grad_()

    assert betti_matching_error(image > 0.5, ring(), frame=False) == (0, 1)
    assert betti_matching_error((z > 0).numpy(), ring()) == (0, 0)
