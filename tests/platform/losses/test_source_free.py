"""Source-free adaptation: entropies, shares and their divergences in closed form."""

import math

import pytest
import torch

from lossworks.entries.losses.maps.source_free import log_shares
from lossworks.errors import UserError
from lossworks.losses import create


def of(logits, **values):
    """Return the loss of logits (B, K, H, W), whose targets all count and are all wrong."""
    targets = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.int64)
    return create("sfda", **values)(logits, targets)


def test_equal_probabilities_have_the_entropy_of_a_coin():
    found = of(torch.zeros(2, 2, 4, 4, dtype=torch.float64), prior_weight=0.0)

    assert found == pytest.approx(math.log(2))


@pytest.mark.parametrize(("direction", "expected"), [("adami", 0.51083), ("adaent", 0.36806)])
def test_the_divergence_of_equal_shares_from_nine_to_one(direction, expected):
    logits = torch.zeros(1, 2, 4, 4, dtype=torch.float64)

    found = of(logits, prior=[0.9, 0.1], direction=direction) - math.log(2)

    assert found == pytest.approx(expected, abs=1e-5)


def test_sure_answers_in_the_expected_shares_cost_nothing():
    logits = torch.full((1, 2, 2, 2), -60.0, dtype=torch.float64)
    logits[0, 0, 0], logits[0, 1, 1] = 60.0, 60.0

    assert of(logits, prior=[0.5, 0.5]) == pytest.approx(0.0, abs=1e-12)


def test_with_equal_shares_it_is_mutual_information_but_for_a_constant():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, 6, dtype=torch.float64, generator=generator)
    p = logits.softmax(1).flatten(2)[0]
    shares = p.mean(1)
    information = -(shares * shares.log()).sum() + (p * p.log()).sum(0).mean()

    assert of(logits) == pytest.approx(float(math.log(3) - information), abs=1e-9)


def test_the_slope_of_the_shares_is_the_log_ratio_plus_one_over_the_pixels():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=generator).softmax(1).requires_grad_()
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    expected = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    own = log_shares(p.log(), valid)

    (slope,) = torch.autograd.grad((own.exp() * (own - expected.log())).sum(), p)

    wanted = ((own.exp() / expected).log() + 1) / 16
    torch.testing.assert_close(slope, wanted[..., None, None].expand_as(slope))


def test_no_target_is_read():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    loss = create("sfda", prior=[0.2, 0.3, 0.5])

    first, second = (loss(logits, torch.full((2, 4, 4), label)) for label in (0, 2))

    assert first == second


def test_each_image_has_its_own_shares():
    logits = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    targets = torch.zeros(2, 4, 4, dtype=torch.int64)
    priors = torch.tensor([[0.9, 0.1], [1.0, 0.0]], dtype=torch.float64)
    loss = create("sfda", reduction="none")

    together = loss(logits, targets, priors=priors)
    alone = [create("sfda", prior=row)(logits[[at]], targets[[at]]) for at, row in enumerate(priors.tolist())]

    torch.testing.assert_close(together, torch.stack(alone))
    assert together.isfinite().all()


def test_an_image_of_which_nothing_counts_has_no_loss_and_no_slope():
    logits = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.zeros(2, 3, 3, dtype=torch.int64)
    targets[1] = -100

    found = create("sfda", prior=[0.5, 0.5], reduction="none")(logits, targets)
    found.sum().backward()

    assert found[1] == 0
    assert torch.count_nonzero(logits.grad[1]) == 0
    assert logits.grad.isfinite().all()


def test_shares_of_other_classes_are_refused_by_name():
    with pytest.raises(UserError, match=r"prior=\[0.5, 0.5\] must be 3 numbers"):
        of(torch.zeros(1, 3, 2, 2), prior=[0.5, 0.5])
