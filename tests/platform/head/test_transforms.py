"""Gradients of single examples and forward-mode derivatives, as ``torch.func`` makes them."""

import pytest
import torch
from torch.func import grad, jvp, vmap

from lossworks import linear_cross_entropy, linear_row_statistics
from lossworks.errors import UserError
from lossworks.losses import create


def problem():
    g = torch.Generator().manual_seed(0)
    e = torch.randn(6, 8, dtype=torch.float64, generator=g)
    c = torch.randn(10, 8, dtype=torch.float64, generator=g)
    return e, c, torch.randint(0, 10, (6,), generator=g)


def one_by_one(value, c, e, y):
    """Return the gradients of single examples by autograd, a pass each."""
    found = []
    for row, target in zip(e, y, strict=True):
        leaf = c.clone().requires_grad_()
        found.append(torch.autograd.grad(value(leaf, row, target), leaf)[0])
    return torch.stack(found)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_gradients_of_single_examples_of_the_head(impl):
    """Also with an option that changes the formula: they are those of one pass for each example."""
    e, c, y = problem()

    def value(c, row, target):
        return linear_cross_entropy(row[None], c, target[None], label_smoothing=0.1, softcap=20.0, impl=impl)

    torch.testing.assert_close(
        vmap(grad(value), (None, 0, 0))(c, e, y), one_by_one(value, c, e, y), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("slug", ["cross-entropy", "ldr", "comp-sum", "log-z"])
def test_gradients_of_single_examples_of_the_catalogue(slug):
    """On logits and on a linear head alike."""
    e, c, y = problem()
    loss = create(slug)

    def dense(c, row, target):
        return loss((c @ row)[None], target[None])

    def linear(c, row, target):
        return loss.linear(row[None], c, target[None])

    wanted = one_by_one(dense, c, e, y)
    for value in (dense, linear):
        torch.testing.assert_close(vmap(grad(value), (None, 0, 0))(c, e, y), wanted, rtol=1e-9, atol=1e-11)


def test_forward_mode():
    """The derivative along a direction is the gradient's product with it."""
    e, c, y = problem()
    direction = torch.ones_like(c)

    def value(c):
        return linear_cross_entropy(e, c, y)

    _, along = jvp(value, (c,), (direction,))

    torch.testing.assert_close(along, (grad(value)(c) * direction).sum(), rtol=1e-10, atol=1e-12)


def test_statistics_of_single_rows():
    """They are those of all rows at once."""
    e, c, y = problem()

    def row(e, target):
        return [part.squeeze(0) for part in linear_row_statistics(e[None], c, target[None])]

    for found, wanted in zip(vmap(row)(e, y), linear_row_statistics(e, c, y), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_kernels_are_not_for_transforms():
    """A kernel that is asked for by its name is refused there with what to ask for."""
    e, c, y = problem()

    with pytest.raises(UserError, match=r"impl='cpu' is not for torch.func's transforms; use auto or ref"):
        grad(lambda c: linear_cross_entropy(e, c, y, impl="cpu"))(c)
