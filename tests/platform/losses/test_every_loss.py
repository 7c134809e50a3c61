"""What losses of all kinds keep to, each on a problem of its own making, from its declaration alone."""

import math

import pytest
import torch

from lossworks.catalogue.registry import entry_class
from lossworks.losses import create, declarations

LOSSES = declarations("losses")
DETERMINED = [slug for slug, entry in LOSSES.items() if "random" not in entry.flags]
# Of a value that is no loss, an invariance says nothing.
MONITORED = [slug for slug, entry in LOSSES.items() if "unmonitored" not in entry.flags]
# Batches that are one element have no count; dco-step counts sequences, and its mean is that of their steps.
COUNTED = [slug for slug in LOSSES if hasattr(entry_class(slug), "count") and slug != "dco-step"]
of_all = pytest.mark.parametrize("slug", list(LOSSES))


def problem_of(slug, rows=8, **settings):
    return create(slug, **settings).problem(rows, torch.Generator().manual_seed(0))


def value(slug, problem, reduction="sum", **settings):
    """Return the loss, made anew so that random ones begin at the same state."""
    loss = create(slug, reduction=reduction, **settings)
    return loss(problem.prediction, problem.target, **problem.context)


@pytest.mark.parametrize(
    ("slug", "case"), [(slug, case) for slug, entry in LOSSES.items() for case in entry.cases]
)
def test_at_its_special_cases_it_is_the_loss_it_reduces_to(slug, case):
    """As declared, values and gradients, by what one element of the other loss weighs."""
    problem = problem_of(slug, **case.hyperparameters)
    z = problem.prediction.requires_grad_()

    own = value(slug, problem, "none", **case.hyperparameters)
    other = value(case.equals, problem, "none", **case.other_hyperparameters)
    expected = case.scale * other + case.constant + case.log_classes * math.log(z.shape[-1])

    torch.testing.assert_close(own / case.scale, expected / case.scale)
    torch.testing.assert_close(
        *(torch.autograd.grad(found.sum() / case.scale, z)[0] for found in (own, expected))
    )


@pytest.mark.parametrize("slug", MONITORED)
def test_what_is_declared_to_change_nothing_does_and_nothing_else(slug):
    """A shift of all of a row's predictions, and a scale."""
    problem = problem_of(slug)
    before = value(slug, problem)

    shifted = value(slug, problem.with_prediction(problem.prediction + 3.0))
    scaled = value(slug, problem.with_prediction(2.5 * problem.prediction))

    assert torch.allclose(shifted, before) == ("shift" in LOSSES[slug].invariances)
    # That of aldr-kl holds to what it adds to the mean it divides by.
    assert torch.allclose(scaled, before) == ("scale" in LOSSES[slug].invariances or slug == "aldr-kl")


@pytest.mark.parametrize("slug", DETERMINED)
def test_the_order_of_rows_changes_nothing(slug):
    """Nor of what goes with them."""
    problem = problem_of(slug)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(value(slug, problem.part(order)), value(slug, problem))


@pytest.mark.parametrize("slug", COUNTED)
def test_a_mean_is_the_sum_over_the_count(slug):
    """By which a training loop divides, once."""
    problem = problem_of(slug)
    loss = create(slug)
    if loss.adds == "statistics":
        pytest.skip("its loss is a function of sums, and no sum of elements")
    count = loss.count(problem.target)
    if loss.adds == "elements":
        count = loss.elements({"targets": problem.target, **problem.context})

    torch.testing.assert_close(value(slug, problem, "mean") * count, value(slug, problem))


@of_all
def test_its_state_is_plain_tensors_and_it_goes_on_from_there(slug):
    """So that a checkpoint needs no pickle: another of the same settings continues what the first began."""
    problem = problem_of(slug)
    loss = create(slug)
    arguments = (problem.prediction, problem.target)
    loss(*arguments, **problem.context)
    state = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    again = create(slug)
    again.load_state_dict(state)

    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    for _ in range(2):
        assert torch.equal(again(*arguments, **problem.context), loss(*arguments, **problem.context))
