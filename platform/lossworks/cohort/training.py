"""Local training, written once: what one client does, for all members of a cohort at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lossworks.cohort.batches import Batches
from lossworks.cohort.optimizers import Optimizer
from lossworks.cohort.rules import LocalRule
from lossworks.cohort.stacked import Stack, StackedModel
from lossworks.losses.objective import RowLosses


@dataclass(frozen=True, eq=False)
class TrainedMembers:
    """Members after their training, in the order they were given in.

    Attributes:
        params: Their parameters, (M, …).
        steps: How many steps each has taken, int64 (M,).
        losses: Mean loss of an example while each trained, without penalties, float32 (M,).
        finite: Whether all losses and parameters of a member are finite, bool (M,).
    """

    params: Stack
    steps: Tensor
    losses: Tensor
    finite: Tensor


def train_members(
    model: StackedModel,
    params: Stack,
    examples: tuple[Tensor, Tensor],
    batches: Batches,
    loss: RowLosses,
    optimizer: Optimizer,
    rule: LocalRule | None = None,
) -> TrainedMembers:
    """Train members, each on its own examples, and leave what was given as it was.

    A step descends on the mean loss of a member's batch plus the rule's penalty. A member that becomes
    non-finite disturbs no other.

    Args:
        model: The architecture.
        params: Where each member starts, (M, …).
        examples: Inputs (N, …) and labels (N,) int64, which the batches name by row.
        batches: Of all members.
        loss: Unreduced.
        optimizer: New, with per-member values in the order of ``batches.members``.
        rule: Hooks, with what they keep in the order of ``batches.members``.
    """
    inputs, labels = examples
    now = {name: value.detach()[batches.members].clone() for name, value in params.items()}
    # All that doesn't depend on parameters is made for all steps at once: a step is short.
    counts = batches.counts
    valid = torch.arange(batches.rows.shape[2]) < counts[..., None]
    targets = torch.where(valid, labels[batches.rows], loss.ignore_index)
    means = torch.zeros(counts.shape)
    for step, front in enumerate((counts > 0).sum(1).tolist()):
        leaves = {name: value[:front] for name, value in now.items()}
        batch = inputs[batches.rows[step, :front]]
        given = _Given(batch, *(each[step, :front] for each in (targets, valid, counts, means)))
        gradients = model.gradients(leaves, batch, partial(_objective, loss, rule, given))
        with torch.no_grad():
            _move(leaves, gradients, optimizer, rule)
    losses = (means * counts).sum(0) / counts.sum(0)
    return _in_order(now, batches, losses)


@dataclass(frozen=True, eq=False)
class _Given:
    """What the members at work have at one step: and room for (m,) losses."""

    inputs: Tensor
    targets: Tensor
    valid: Tensor
    counts: Tensor
    means: Tensor


def _objective(
    loss: RowLosses, rule: LocalRule | None, given: _Given, hidden: Tensor, logits: Tensor
) -> Tensor:
    """Return what each member descends on, (m,), and keep its mean loss."""
    own = loss(logits, given.targets).sum(1) / given.counts
    given.means.copy_(own.detach())
    extra = rule.penalty(given.inputs, hidden, logits, given.valid) if rule else None
    return own if extra is None else own + extra


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
