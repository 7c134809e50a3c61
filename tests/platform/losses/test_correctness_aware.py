"""Correctness-aware calibration: what its loss pulls at, and that it calibrates without changing answers."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lossworks.entries.methods.correctness_aware import (
    correctness_loss,
)
from lossworks.entries.methods.temperature_scaling import fit_temperature
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.tasks.calibration import confidence, image_views, signal_views


def problem(n=400, k=6, seed=0):
    """Return over-confident logits, right three times in five, with views that agree where they are right."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=g)
    right = torch.rand(n, generator=g) < 0.6
    answer = torch.where(right, labels, (labels + 1) % k)
    logits = torch.randn(n, k, generator=g) + 6 * torch.nn.functional.one_hot(answer, k)
    noise = torch.where(right, 0.5, 3.0)[:, None]
    views = torch.stack([logits + noise * torch.randn(n, k, generator=g) for _ in range(3)])
    return logits, views, labels


def test_the_loss_is_the_brier_score_of_the_answer():
    """By hand, for a right row and a wrong one."""
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(9.0), 0.0]])
    losses = correctness_loss(logits, torch.ones(2), torch.tensor([0, 1]))

    torch.testing.assert_close(losses, torch.tensor([0.25**2, 0.9**2]))


def test_wrong_rows_get_warmer_and_right_ones_colder():
    """Where cross-entropy cools a narrow miss; by ∂log p_k/∂T = (E_p[z] − z_k)/T²."""
    logits = torch.tensor([[2.0, 1.9, 0.5, 0.5]], dtype=torch.float64)
    temperature = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def slope(loss):
        return torch.autograd.grad(loss, temperature)[0].item()

    missed = torch.tensor([1])
    p = logits.softmax(1)
    assert slope(correctness_loss(logits, temperature, missed).sum()) < 0
    assert slope(correctness_loss(logits, temperature, torch.tensor([0])).sum()) > 0
    of_ce = slope(cross_entropy(logits / temperature, missed))
    assert of_ce > 0
    assert of_ce == pytest.approx(-((p * logits).sum() - logits[0, 1]).item())


def test_balanced_weights_are_those_of_the_code():
    """Right rows by the error rate, wrong ones by the accuracy, of mean weight 1."""
    logits = torch.tensor([[1.0, 0.0]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    plain = correctness_loss(logits, torch.ones(4), labels)
    weights = torch.tensor([0.25, 0.25, 0.25, 0.75]) / 0.375

    torch.testing.assert_close(correctness_loss(logits, torch.ones(4), labels, balance=True), plain * weights)


def test_it_calibrates_and_changes_no_answer():
    """Better than temperature scaling where the views tell right from wrong; the same for the same seed."""
    logits, views, labels = problem()
    other, other_views, other_labels = problem(seed=1)
    entry = create("correctness-aware", lr=1e-2, epochs=200)
    calibrator, again = (entry.fit(logits, views, labels, seed=3) for _ in range(2))

    def brier(temperature):
        return correctness_loss(other, temperature, other_labels).mean().item()

    scaled = brier(torch.full((len(other),), fit_temperature(logits, labels)))
    with torch.no_grad():
        found = calibrator(other, other_views)
    p = calibrator.probabilities(other, other_views)

    assert brier(found) < scaled - 0.02 < brier(torch.ones(len(other)))
    assert torch.equal(p.argmax(1), other.argmax(1))
    torch.testing.assert_close(p.amax(1), confidence(other, found))
    assert all(torch.equal(a, b) for a, b in zip(calibrator.parameters(), again.parameters(), strict=True))
    assert 0.1 <= found.min() <= found.max() <= 10


def test_one_temperature_is_that_of_least_cross_entropy():
    """Logits that were divided by 3 come back."""
    g = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(4000, 4, generator=g)
    labels = torch.multinomial((logits / 3).softmax(1), 1, generator=g).squeeze(1)

    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(("views", "shape"), [(signal_views, (5, 1, 40)), (image_views, (5, 3, 8, 8))])
def test_views_are_other_inputs_of_the_same_shape(views, shape):
    """And the same again for the same seed."""
    x = torch.randn(shape)
    for one, same in zip(views(0), views(0), strict=True):
        assert one(x).shape == x.shape
        assert not torch.allclose(one(x), x)
        assert torch.equal(one(x), same(x))


def test_half_precision_is_read_in_float32_and_the_model_left_alone():
    """The calibrator is float32, and no gradient reaches the logits it is fitted to."""
    logits, views, labels = problem(n=20)
    logits = logits.bfloat16().requires_grad_()
    entry = create("correctness-aware", epochs=1)

    calibrator, same = entry.fit(logits, views, labels), entry.fit(logits.float(), views, labels)

    assert logits.grad is None
    assert torch.equal(calibrator(logits, views), same(logits.float(), views))
    assert calibrator.probabilities(logits, views).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    """Shapes and bounds, by name, and nothing to fit."""
    logits, views, labels = problem(n=8)
    with pytest.raises(UserError, match=r"nothing to fit: views \(0, 8, 6\)"):
        create("correctness-aware").fit(logits, views[:0], labels)
    with pytest.raises(UserError, match=r"nothing to fit: views \(3, 0, 6\)"):
        create("correctness-aware").fit(logits[:0], views[:, :0], labels[:0])
    with pytest.raises(UserError, match=r"views \(8, 6\) and labels \(8,\) must be"):
        create("correctness-aware").fit(logits, views[0], labels)
    with pytest.raises(UserError, match="lowest=20 must be below highest=10"):
        create("correctness-aware", lowest=20.0).fit(logits, views, labels)
