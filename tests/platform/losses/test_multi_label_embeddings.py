"""Losses of sets of labels on embeddings: what their scores give, most without all scores at once."""

import math

import pytest
import torch

from lossworks.errors import UserError
from lossworks.losses import create, declarations
from lossworks_testing.memory import peak_bytes

IGNORE = -100
ALL = [slug for slug, entry in declarations().items() if entry.kind == "multi-label"]
STREAMED = [slug for slug in ALL if declarations()[slug].without_logits]
# Of six rows and seven labels: one positive, two, three, one given twice, none, and all.
POSITIVES = torch.full((6, 7), IGNORE)
for row, labels in enumerate([[3], [0, 5], [1, 2, 4], [6, 6, 0], [], [2, 3, 4, 5, 6, 0, 1]]):
    POSITIVES[row, : len(labels)] = torch.tensor(labels, dtype=torch.int64)


def embeddings(n=6, labels=7, d=4, *, dtype=torch.float64, seed=2):
    g = torch.Generator().manual_seed(seed)
    e, c = torch.randn(n, d, dtype=dtype, generator=g), torch.randn(labels, d, dtype=dtype, generator=g)
    return e.requires_grad_(), c.requires_grad_()


def scores_of(e, c, *, normalise):
    normal = torch.nn.functional.normalize
    return normal(e, dim=1) @ normal(c, dim=1).T if normalise else e @ c.T


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("block", [1, 3, 7, 100])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("slug", STREAMED)
def test_embeddings_give_what_their_scores_give(slug, normalise, block, reduction):
    """Values and gradients under a random upstream one, for blocks that divide the labels or don't."""
    e, c = embeddings()
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64)
    loss = create(slug, reduction=reduction, normalise=normalise, temperature=0.1)

    dense = loss(scores_of(e, c, normalise=normalise) + bias, POSITIVES, weight=weight)
    streamed = loss.linear(e, c, POSITIVES, bias, block=block, weight=weight)

    torch.testing.assert_close(streamed, dense)
    upstream = torch.randn(dense.shape, dtype=torch.float64)
    torch.testing.assert_close(
        *(torch.autograd.grad(found, (e, c, bias), upstream) for found in (streamed, dense))
    )


@pytest.mark.parametrize("bias", [None, torch.randn(7, dtype=torch.float64)])
@pytest.mark.parametrize("slug", ALL)
def test_every_loss_of_sets_takes_embeddings(slug, bias):
    """It is that of the scores which rank labels, and rows that don't count may hold anything."""
    e, c = embeddings()
    loss = create(slug)
    spoilt = e.detach().clone()
    spoilt[4] = math.nan
    spoilt.requires_grad_()

    found = loss.linear(spoilt, c, POSITIVES, bias)
    of_e, of_c = torch.autograd.grad(found, (spoilt, c))

    torch.testing.assert_close(found, loss(loss.scores(e, c, bias), POSITIVES))
    assert of_e.isfinite().all()
    assert of_c.isfinite().all()
    assert of_e[4].abs().max() == 0


@pytest.mark.parametrize("slug", ALL)
def test_gradients_of_embeddings_are_those_of_finite_differences(slug):
    """Through normalisation and temperature."""
    e, c = embeddings()
    loss = create(slug, temperature=0.5, normalise=True, reduction="none")

    assert torch.autograd.gradcheck(lambda e, c: loss.linear(e, c, POSITIVES), (e, c))


def test_positives_that_dominate_do_not_cancel():
    """In float32, positives 60 above the negatives: taking them off the whole sum would leave nothing."""
    e, c = torch.tensor([[1.0]]), torch.tensor([[60.0], [0.0], [60.0], [-1.0]])
    loss = create("decoupled-softmax", temperature=1.0, normalise=False)

    value = loss.linear(e, c, torch.tensor([[0, 2]]), block=2).item()

    assert value == pytest.approx(math.log1p((1 + math.exp(-1)) * math.exp(-60)), rel=1e-5)


def test_autocast_leaves_the_products_of_embeddings_in_float32():
    """Which a temperature of 0.05 asks for."""
    e, c = (t.detach().float() for t in embeddings())
    loss = create("decoupled-softmax")
    expected = loss.linear(e, c, POSITIVES)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss.linear(e, c, POSITIVES), expected)


def test_half_precision_embeddings():
    """Are read in float32, and their gradients have their dtype."""
    e, c = (t.detach().bfloat16().requires_grad_() for t in embeddings(dtype=torch.float32))
    positives = POSITIVES
    for normalise in (True, False):
        loss = create("decoupled-softmax", normalise=normalise)
        value = loss.linear(e, c, positives, block=3)
        wide = scores_of(e.float(), c.float(), normalise=normalise)
        gradients = torch.autograd.grad(value, (e, c))

        torch.testing.assert_close(value, loss(wide, positives), rtol=1e-4, atol=1e-4)
        assert value.dtype == torch.float32
        assert [g.dtype for g in gradients] == [torch.bfloat16] * 2


@pytest.mark.parametrize("slug", STREAMED)
def test_embeddings_take_far_less_memory_than_their_scores(slug):
    """Forward and backward, 20 000 labels: a tenth of what dense scores take."""
    e, c = embeddings(64, 20_000, 8, dtype=torch.float32)
    positives = torch.randint(0, 20_000, (64, 10), generator=torch.Generator().manual_seed(0))
    loss = create(slug, normalise=False)

    dense = peak_bytes(lambda: torch.autograd.grad(loss(e @ c.T, positives), (e, c)))
    streamed = peak_bytes(lambda: torch.autograd.grad(loss.linear(e, c, positives, block=512), (e, c)))

    assert streamed < dense / 10


def test_embeddings_that_do_not_fit_are_refused():
    """By name, with the shapes that are right."""
    e, c = embeddings()
    with pytest.raises(UserError, match=r"must be \(N, D\) and \(L, D\)"):
        create("decoupled-softmax").linear(e, c[:, :3], POSITIVES)
    with pytest.raises(UserError, match=r"bias \(3,\) must be \(7,\)"):
        create("soft-top-k").linear(e, c, POSITIVES, c[:3, 0])
    with pytest.raises(UserError, match="block=0 must be at least 1"):
        create("decoupled-softmax").linear(e, c, POSITIVES, block=0)
