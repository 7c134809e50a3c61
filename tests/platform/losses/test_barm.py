"""Background adaptation with residual modelling: its terms in closed form, and which parts of it learn."""

import pytest
import torch
from torch.nn import functional

from lossworks.entries.methods.barm import (
    Barm,
    feature_distance,
    one_hot,
    pixelwise,
    residual_cross_entropy,
    residual_triplet,
    with_pseudo_labels,
)
from lossworks.losses.objective import Objective
from lossworks.models.segmentation import build_segmenter
from lossworks.models.segmentation.incremental import StepOutputs
from lossworks.specs import LossSpec
from lossworks.specs.tasks.segmenter import SegmenterSpec


@pytest.fixture
def model():
    spec = SegmenterSpec(kind="incremental-unet", levels=1, width=4, groups=2, steps=(2, 1))
    return build_segmenter(spec, channels=3, classes=4, seed=0).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 4, (2, 8, 8), generator=generator)
    targets[0, 0] = -100
    return {
        "inputs": torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=generator),
        "targets": targets,
    }


def begun(model, **values):
    """Return the method in its second step, as training reaches it."""
    method = Barm(starts=[2.0], **values)
    method.fit_to(None, model)
    method.start(None, model)
    method.batch({"targets": torch.zeros(1, 1, 1, dtype=torch.int64)}, 3)
    return method


def test_residuals_that_are_not_negative_leave_the_background_as_it_was(model, batch):
    with torch.no_grad():
        model.heads[1].weight.zero_()
        model.heads[1].bias.fill_(0.3)

    outputs = model.outputs(batch["inputs"])

    assert torch.equal(outputs.logits[..., 0], outputs.sides[0].logits[..., 0])


def test_residuals_below_zero_lower_the_background(model, batch):
    with torch.no_grad():
        model.heads[1].weight.zero_()
        model.heads[1].bias.fill_(-0.3)

    outputs = model.outputs(batch["inputs"])

    torch.testing.assert_close(outputs.logits[..., 0], outputs.sides[0].logits[..., 0] - 0.3)


def test_the_triplet_is_one_less_two_sigmoids_where_that_is_positive():
    residual = torch.linspace(-5, 5, 101, dtype=torch.float64)
    background = (torch.arange(101) % 3 > 0).double()

    expected = ((1 - 2 * residual.sigmoid()).clamp(min=0) * background).sum() / background.sum()

    torch.testing.assert_close(residual_triplet(residual, background), expected, atol=1e-7, rtol=0)
    assert residual_triplet(residual.abs(), background) == 0


def test_terms_without_pixels_are_zero_and_not_nan():
    residual = torch.randn(5, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(5, dtype=torch.float64)

    total = residual_triplet(residual, nothing) + residual_cross_entropy(residual, nothing)
    total.backward()

    assert total == 0
    assert torch.equal(residual.grad, nothing)


def test_cross_entropy_teaches_the_residual_and_new_classes_alone(model, batch):
    method = begun(model, triplet=0, adaptation=0, features=0, heads=0)
    relabelled = method.batch(batch, 3)

    sums = method.loss(model.outputs(batch["inputs"]), relabelled, Objective(LossSpec()))
    sums.sum().backward()

    assert torch.count_nonzero(model.heads[0].weight.grad) == 0
    assert torch.count_nonzero(model.heads[0].bias.grad) == 0
    assert torch.count_nonzero(model.heads[1].weight.grad) > 0


def test_old_heads_that_did_not_change_cost_their_entropy_and_no_distance(model, batch):
    method = begun(model)
    found = StepOutputs.of(model.outputs(batch["inputs"]))
    before = StepOutputs.of(method._previous.read(batch["inputs"]))
    everywhere = torch.ones(2, 8, 8, dtype=torch.bool)

    told = pixelwise(found.heads[0], before.heads[0].sigmoid(), everywhere)
    p = found.heads[0].sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).sum(-1).mean()

    torch.testing.assert_close(told, entropy)
    assert feature_distance(found.ears, before.ears, everywhere.double()) == 0


def test_pseudo_labels_are_taken_where_the_label_is_background_and_the_answer_sure():
    previous = torch.tensor(
        [[[[0.0, 3.0, 0.0]]], [[[0.0, 0.5, 0.0]]], [[[3.0, 0.0, 0.0]]], [[[0.0, 3.0, 0.0]]]]
    )
    targets = torch.tensor([0, 0, 0, 2]).reshape(4, 1, 1)

    found = with_pseudo_labels(targets, previous, 0.7)

    assert found.flatten().tolist() == [1, 0, 0, 2]


def test_the_first_step_is_binary_cross_entropy_of_its_own_channels(model, batch):
    method = Barm(starts=[2.0])
    method.fit_to(None, model)
    method.start(None, model)
    relabelled = method.batch(batch, 1)

    sums = method.loss(model.outputs(batch["inputs"]), relabelled, Objective(LossSpec()))

    logits = model.outputs(batch["inputs"]).sides[0].logits
    valid = batch["targets"] != -100
    assert set(relabelled["targets"][valid].unique().tolist()) == {0, 1, 2}
    own = one_hot(relabelled["targets"], logits)
    expected = functional.binary_cross_entropy_with_logits(logits[valid], own[valid], reduction="sum")
    torch.testing.assert_close(sums[0], expected)


def test_updates_of_older_parts_are_shortened(model, batch):
    method = begun(model, old_rate=0.25)
    before = {name: value.clone() for name, value in model.named_parameters()}
    method.gradients(model, 3)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1.0)

    method.after_step(model, 3)

    moved = {name: float((value - before[name]).mean().detach()) for name, value in model.named_parameters()}
    newest = {name for name in moved if name.startswith(("ears.1.", "heads.1."))}
    assert all(moved[name] == pytest.approx(1.0 if name in newest else 0.25) for name in moved)


def test_a_state_gives_the_same_previous_model(model, batch):
    method = begun(model)
    other = Barm(starts=[2.0])
    other.fit_to(None, model)
    model.step.fill_(1)  # as a checkpoint holds it
    other.load_state(method.state())
    other.start(None, model)

    first, second = (one._previous.read(batch["inputs"]).logits for one in (method, other))

    assert torch.equal(first, second)
