"""The factored head takes the very steps that gradient descent on the dense weights takes."""

import pytest
import torch

from lossworks.entries.losses.classification.factored_head import FactoredHead
from lossworks.entries.losses.classification.spherical_z import SphericalZ
from lossworks.errors import UserError
from lossworks.losses import create


def dense_step(weight, hidden, targets, loss, lr):
    """Return loss, gradient of the features, and the new weights, by autograd on the logits."""
    w, h = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    value = loss(h @ w.T, targets)
    of_h, of_w = torch.autograd.grad(value, (h, w))
    return value.detach(), of_h, weight - lr * of_w


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("recondition_every", [3, 1000])
def test_every_step_is_that_of_dense_gradient_descent(reduction, recondition_every):
    """Losses, feature gradients and weights over 60 steps, with classes that meet twice in a batch."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 6, dtype=torch.float64, generator=g)
    loss = create("spherical-z-loss", a=2.0, b=1.5, reduction=reduction)
    head = FactoredHead(weight, loss, recondition_every=recondition_every)
    for _ in range(60):
        hidden = torch.randn(8, 6, dtype=torch.float64, generator=g)
        targets = torch.randint(0, 10, (8,), generator=g)
        expected = dense_step(weight, hidden, targets, loss, lr=0.3)
        weight = expected[2]

        value, of_hidden = head.step(hidden, targets, lr=0.3)

        torch.testing.assert_close((value, of_hidden, head.weight()), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(head(hidden), hidden @ weight.T)
    torch.testing.assert_close(head.u @ head.u_inverse, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(head.gram, weight.T @ weight)


def test_drifted_directions_are_folded_back():
    """The product stays, and no singular value of U is left outside of its bounds."""
    g = torch.Generator().manual_seed(1)
    head = FactoredHead(torch.randn(9, 4, dtype=torch.float64, generator=g), SphericalZ())
    stretch = torch.tensor([8.0, 1.0, 0.1, 1.0], dtype=torch.float64)
    head.u, head.u_inverse = head.u * stretch, head.u_inverse / stretch[:, None]
    before = head.weight()

    head._recondition()

    assert torch.linalg.svdvals(head.u).min() > 0.5
    assert torch.linalg.svdvals(head.u).max() < 2.0
    torch.testing.assert_close(head.weight(), before)
    torch.testing.assert_close(head.u @ head.u_inverse, torch.eye(4, dtype=torch.float64))


def test_it_resumes_from_its_state():
    """All of it is in the state_dict, the step counter too."""
    g = torch.Generator().manual_seed(2)
    weight, hidden = torch.randn(9, 4, generator=g), torch.randn(5, 4, generator=g)
    targets = torch.tensor([0, 1, 1, 8, 4])
    head, other = FactoredHead(weight, SphericalZ()), FactoredHead(torch.zeros(9, 4), SphericalZ())
    head.step(hidden, targets, lr=0.1)

    other.load_state_dict(head.state_dict())

    assert torch.equal(head.step(hidden, targets, lr=0.1)[1], other.step(hidden, targets, lr=0.1)[1])
    assert torch.equal(head.weight(), other.weight())
    assert other.steps == 2


def test_what_it_can_not_do_is_refused():
    """By name."""
    with pytest.raises(UserError, match=r"weight \(1, 3\) must be"):
        FactoredHead(torch.zeros(1, 3), SphericalZ())
    with pytest.raises(UserError, match="reduction='none' must be mean or sum"):
        FactoredHead(torch.zeros(3, 3), SphericalZ(reduction="none"))
    with pytest.raises(UserError, match="recondition_every=0"):
        FactoredHead(torch.zeros(3, 3), SphericalZ(), recondition_every=0)
