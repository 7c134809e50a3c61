"""Local training, written once: what one client does, for all members of a cohort at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossworks.cohort.batches import Batches
from lossworks.cohort.learners import Learner
from lossworks.cohort.optimizers import Optimizer
from lossworks.cohort.rules import LocalRule
from lossworks.cohort.stacked import Stack


@dataclass(frozen=True, eq=False)
class TrainedMembers:
    """Members after their training, in the order they were given in.

    Attributes:
        params: Their parameters, (M, …).
        steps: How many steps each has taken, int64 (M,).
        losses: Mean loss of an element while each trained, without penalties, float32 (M,).
        finite: Whether all losses and parameters of a member are finite, bool (M,).
    """

    params: Stack
    steps: Tensor
    losses: Tensor
    finite: Tensor


def train_members(
    learner: Learner,
    params: Stack,
    batches: Batches,
    optimizer: Optimizer,
    rule: LocalRule | None = None,
) -> TrainedMembers:
    """Train members, each on its own examples, and leave what was given as it was.

    A step descends on the mean loss of a member's batch plus the rule's penalty. A member that becomes
    non-finite disturbs no other.

    Args:
        learner: What they learn from; the batches name its rows.
        params: Where each member starts, (M, …).
        batches: Of all members.
        optimizer: New, with per-member values in the order of ``batches.members``.
        rule: Hooks, with what they keep in the order of ``batches.members``.
    """
    now = {name: value.detach()[batches.members].clone() for name, value in params.items()}
    steps = learner.steps(batches)
    for step, front in enumerate((batches.counts > 0).sum(1).tolist()):
        leaves = {name: value[:front] for name, value in now.items()}
        gradients = steps.gradients(step, leaves, rule)
        with torch.no_grad():
            _move(leaves, gradients, optimizer, rule)
    losses = (steps.means * steps.weights).sum(0) / steps.weights.sum(0)
    return _in_order(now, batches, losses)


def _move(leaves: Stack, gradients: Sequence[Tensor], optimizer: Optimizer, rule: LocalRule | None) -> None:
    """Take one step in place."""
    if rule is None and optimizer.move(list(leaves.values()), gradients):
        return
    rule = rule or LocalRule()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        leaf.add_(rule.update(name, optimizer.step(name, leaf, rule.gradient(name, gradient, leaf))))


def _in_order(now: Stack, batches: Batches, losses: Tensor) -> TrainedMembers:
    """Return the members in the order they were given in."""
    finite = losses.isfinite()
    for value in now.values():
        finite &= torch.linalg.vector_norm(value.detach().flatten(1), torch.inf, dim=1).isfinite()
    back = batches.members.argsort()
    if torch.equal(back, torch.arange(len(back))):  # mostly: members of equal sizes stay where they are
        return TrainedMembers({n: v.detach() for n, v in now.items()}, batches.steps, losses, finite)
    params = {name: value.detach()[back] for name, value in now.items()}
    return TrainedMembers(params, batches.steps[back], losses[back], finite[back])
