"""What members have in common while they are trained, at once or one by one."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossworks.cohort.batches import Batches
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


def members_in(params: Stack) -> int:
    """Return how many members a stack holds."""
    return len(next(iter(params.values())))


def copies(params: Stack, batches: Batches) -> Stack:
    """Return copies of members' parameters (M, …) in the order of their batches."""
    return {name: value.detach()[batches.members].clone() for name, value in params.items()}


def move(leaves: Stack, gradients: Sequence[Tensor], optimizer: Optimizer, rule: LocalRule | None) -> None:
    """Take one step of members in place.

    Args:
        leaves: Parameters (m, …).
        gradients: Of them, in the same order.
        optimizer: Gives steps.
        rule: Alters gradients and steps.
    """
    if rule is None and optimizer.move(list(leaves.values()), gradients):
        return
    rule = rule or LocalRule()
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        leaf.add_(rule.update(name, optimizer.step(name, leaf, rule.gradient(name, gradient, leaf))))


def all_finite(stacked: Tensor) -> Tensor:
    """Return which members of a stack (M, …) hold finite numbers alone, bool (M,)."""
    # Both are NaN or infinite where anything is; norms by rows take twenty times as long.
    flat = stacked.reshape(len(stacked), -1)
    return flat.amax(1).isfinite() & flat.amin(1).isfinite()


def ended(now: Stack, batches: Batches, losses: Tensor) -> TrainedMembers:
    """Return members that have trained, in the order they were given in.

    Args:
        now: Parameters (M, …) in the order of the batches.
        batches: What they took.
        losses: Mean loss of each in that order, (M,).
    """
    finite = losses.isfinite()
    for value in now.values():
        finite &= all_finite(value.detach())
    back = batches.members.argsort()
    if torch.equal(back, torch.arange(len(back))):  # mostly: members of equal sizes stay where they are
        return TrainedMembers({n: v.detach() for n, v in now.items()}, batches.steps, losses, finite)
    params = {name: value.detach()[back] for name, value in now.items()}
    return TrainedMembers(params, batches.steps[back], losses[back], finite[back])
