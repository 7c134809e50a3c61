"""Self-distillation: what is descended on, what has a gradient, and what it refuses."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lossworks.catalogue.registry import create
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models.interface import Head, Outputs
from lossworks.specs import LossSpec

LOSSES = {"name": "ce-dice", "plus": [{"name": "cldice", "weight": 0.5}]}


def outputs_of(seed):
    """Return features (2, 5, 6, 4) and a head of three classes, both with gradients."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, 5, 6, 4, generator=g), torch.randn(3, 4, generator=g)
    return Outputs(hidden.requires_grad_(), Head(weight.requires_grad_()))


def targets():
    found = torch.randint(0, 3, (2, 5, 6), generator=torch.Generator().manual_seed(9))
    found[0, 0] = -100
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_teacher_takes_the_place_of_the_mask(temperature):
    """Of every term; ignored pixels stay out, and the teacher gets no gradient."""
    objective = Objective(LossSpec.model_validate(LOSSES))
    own, theirs = outputs_of(0), outputs_of(1)
    method = create("self-distillation", temperature=temperature)
    batch = {"targets": targets()}

    found = method.loss(own.with_roles({"teacher": theirs}), batch, objective)

    soft = (theirs.logits / temperature).softmax(-1).movedim(-1, 1)
    expected = [
        create(slug, reduction="sum")(own.logits.movedim(-1, 1), batch["targets"], soft_targets=soft)
        for slug in ("ce-dice", "cldice")
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    found.sum().backward()
    assert own.hidden.grad[0, 0].abs().max() == 0
    assert own.hidden.grad[0, 1:].abs().max() > 0
    assert theirs.hidden.grad is None
    assert theirs.head.weight.grad is None


def test_a_teacher_that_is_sure_changes_nothing():
    """Where it says what the mask says, a round is one without it."""
    objective = Objective(LossSpec.model_validate(LOSSES))
    own, batch = outputs_of(0), {"targets": targets()}
    logits = 1e4 * torch.nn.functional.one_hot(batch["targets"].clamp(min=0), 3).float()
    teacher = Outputs(logits, None, dense=logits)

    found = create("self-distillation").loss(own.with_roles({"teacher": teacher}), batch, objective)

    torch.testing.assert_close(found, objective(own, batch))


def test_losses_that_take_no_probabilities_are_refused():
    """By their name, and with one that does."""
    spec = cast("Any", SimpleNamespace(loss=LossSpec.model_validate("ldr")))
    with pytest.raises(UserError, match=r"losses of maps, such as ce-dice, .* loss\.name=ldr is a row loss"):
        create("self-distillation").check(cast("Any", None), spec)
    create("self-distillation").check(
        cast("Any", None), cast("Any", SimpleNamespace(loss=LossSpec.model_validate(LOSSES)))
    )
