"""The training objective that a spec names: a weighted sum of losses, as one part of what is trained.

Losses sum and whoever trains divides, once, by the count of what is valid over all ranks and micro-batches: a
mean of means would weigh elements by where they happen to lie. T terms, S numbers that add up.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from lossworks.catalogue.registry import create
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.head import VocabParallel, linear_row_loss, linear_teacher_loss
from lossworks.losses.gathered_rows import gather_rows, head_group
from lossworks.losses.interface import Loss, RowLoss, Taught
from lossworks.models.interface import Head, HeadedModel, Outputs
from lossworks.specs import LossSpec


class Objective(nn.Module):
    """A weighted sum of losses; called inside a model's forward it gives numbers that add up.

    Row losses that see a row only through the label's logit and one logsumexp share a single pass over the
    logits, whatever their number: three products, as plain cross-entropy takes. A divergence from a teacher
    joins them there, for the one product of the teacher's logits.

    Args:
        spec: The losses, with their weights.

    Attributes:
        titles: What each term is called.
        losses: The terms.
        weights: Factors of the terms at the present step; see :meth:`begin`.
        sizes: How many sums each term has, as they were last taken.
    """

    def __init__(self, spec: LossSpec) -> None:
        super().__init__()
        self.spec, self.titles = spec, spec.titles
        self.losses = nn.ModuleList(build_loss(term) for term in spec.terms)
        self.weights: tuple[float, ...] = ()
        self.sizes = [1] * len(self.losses)
        self.begin(1)

    @property
    def terms(self) -> list[Loss]:
        """The losses of the sum."""
        return [cast("Loss", loss) for loss in self.losses]

    @property
    def two_passes(self) -> bool:
        """Whether a term is a function of sums over the whole batch, which a first pass has to give."""
        return any(loss.adds == "statistics" for loss in self.terms)

    @property
    def learns(self) -> bool:
        """Whether a term has parameters of its own."""
        return any(loss.learns for loss in self.terms)

    def fit_to(self, model: HeadedModel) -> None:
        """Let the terms make their own parameters for a model, before it is trained."""
        for loss in self.terms:
            loss.fit_to(model)

    def begin(self, step: int) -> None:
        """Set the weights of a step, counted from 1."""
        self.weights = tuple(term.weight.at(step) for term in self.spec.terms)

    def advance(self, sums: Tensor) -> None:
        """Let the terms go on by a step, after its update.

        Args:
            sums: Of all terms over all micro-batches and ranks, (S,).
        """
        for loss, part in zip(self.terms, self._split(sums.detach()), strict=True):
            loss.advance(part)

    def counts(self, batch: Batch) -> list[float]:
        """Return what the sums of each term are divided by in the end, (T,); those of parts are added."""
        return [loss.elements(batch) for loss in self.terms]

    def forward(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the sums of all terms, one behind the other, (S,).

        With a head that is split over ranks each rank returns an equal share of the sums of all ranks' rows.
        """
        group = head_group(outputs.head)
        if group is None or outputs.head is None:
            return self._sums(outputs, batch)
        if "weight" in batch:
            raise ValueError("a head that is split over ranks takes no weights of rows")
        rows, targets = gather_rows(outputs.hidden, batch["targets"], group)
        parallel = VocabParallel(group, reduce_e=False)  # the rows' backward pass sums, and scatters at once
        everywhere = Outputs(rows, outputs.head)
        return self._sums(everywhere, {"targets": targets}, vocab_parallel=parallel) / group.size()

    def value(self, sums: Tensor, counts: Sequence[float]) -> tuple[float, dict[str, float]]:
        """Return the objective of sums (S,) and counts (T,) over all parts, and each term by its title."""
        found = [float(v) for v in self._values(sums.detach(), counts)]
        total = sum(w * v for w, v in zip(self.weights, found, strict=True))
        return total, dict(zip(self.titles, found, strict=True))

    def total(self, sums: Tensor, counts: Sequence[float]) -> Tensor:
        """Return the objective of sums (S,) and counts (T,) as a differentiable scalar."""
        values = self._values(sums, counts)
        return torch.stack([w * v for w, v in zip(self.weights, values, strict=True)]).sum()

    def slopes(self, sums: Tensor, counts: Sequence[float], scale: float = 1.0) -> Tensor:
        """Return the derivatives of ``scale`` times the objective by the sums, (S,) float64.

        Args:
            sums: Of all parts, (S,); only read where there are terms that take two passes.
            counts: Of all parts, (T,).
            scale: A factor, for what averages gradients over ranks.
        """
        if not self.two_passes:
            pairs = zip(self.weights, counts, strict=True)
            return torch.tensor([w * scale / c if c else 0.0 for w, c in pairs], dtype=torch.float64)
        leaf = sums.detach().double().requires_grad_()
        total = self.total(leaf, counts)
        (slopes,) = torch.autograd.grad(total, leaf, allow_unused=True, materialize_grads=True)
        return scale * slopes

    def _values(self, sums: Tensor, counts: Sequence[float]) -> list[Tensor]:
        parts = self._split(sums)
        return [loss.value(part, count) for loss, part, count in zip(self.terms, parts, counts, strict=True)]

    def _split(self, sums: Tensor) -> list[Tensor]:
        """Return the sums of each term, as long as they were when they were last taken."""
        return list(sums.split(self.sizes))

    def _sums(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        joint = self._joint_sums(outputs, batch) if not how else {}
        parts = [
            joint[place] if place in joint else loss.sums(outputs, batch, impl=self.spec.impl, **how)
            for place, loss in enumerate(self.terms)
        ]
        self.sizes = [len(part) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _joint_sums(self, outputs: Outputs, batch: Batch) -> dict[int, Tensor]:
        """Return the sums of terms that share a pass, by place."""
        head, impl = outputs.head, self.spec.impl
        if head is None or impl == "reference" or len(self.terms) == 1 or "weight" in batch:
            return {}
        found: dict[int, Tensor] = {}
        taught = self._taught(outputs)
        for places in self._sharing():
            losses = [cast("RowLoss", self.terms[place]) for place in places]
            beside = taught if losses[0].target_offset == 0 else None
            if beside is not None:
                places.append(beside[0])
                taught = None
            if len(places) < 2:
                continue
            weights = [self.weights[place] for place in places]
            divergence = None if beside is None else beside[1]
            sums = _pass_of(losses, divergence, weights, outputs.hidden, head, batch["targets"], impl)
            found |= dict(zip(places, sums, strict=True))
        return found

    def _taught(self, outputs: Outputs) -> tuple[int, Taught] | None:
        """Return the first term that is a divergence from a teacher, with its place."""
        for place, loss in enumerate(self.terms):
            taught = loss.taught(outputs) if self.weights[place] else None
            if taught is not None:
                return place, taught
        return None

    def _sharing(self) -> Iterator[list[int]]:
        """Yield the places of terms that read the same two numbers of a row."""

        def read(place: int) -> tuple[float, float]:
            loss = cast("RowLoss", self.terms[place])
            return loss.lse_temperature, loss.target_offset

        joint = [
            place
            for place, loss in enumerate(self.terms)
            if isinstance(loss, RowLoss) and loss.joint and self.weights[place]
        ]
        for _, group in groupby(sorted(joint, key=read), key=read):
            yield sorted(group)


def _pass_of(
    losses: Sequence[RowLoss],
    taught: Taught | None,
    weights: Sequence[float],
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    impl: Any,
) -> list[Tensor]:
    """Return the sum of each of some row losses, and of a divergence behind them, (1,) each, from one pass.

    Their values are their own; the gradient of all of them, weighted, is at the first, over its weight.
    """
    first, classes = losses[0], len(head.weight)
    own = [0.0 * hidden.new_zeros(1, dtype=torch.float64) for _ in weights]

    def phi(target: Tensor, lse: Tensor, *divergence: Tensor) -> Tensor:
        values = [loss.phi(target, lse, classes) for loss in losses]
        values += [taught.factor * one for one in divergence] if taught is not None else []
        total = torch.zeros_like(target)
        for place, (value, weight) in enumerate(zip(values, weights, strict=True)):
            own[place] += value.detach().double().sum()
            total = total + weight * value
        return total

    offset = first.target_offset
    how: dict[str, Any] = {
        "ignore_index": first.ignore_index,
        "softcap": head.softcap,
        "temperature": first.lse_temperature,
        "impl": impl,
    }
    if taught is not None:
        found = linear_teacher_loss(*(hidden, head.weight, targets, taught.divergence, phi, head.bias), **how)
    else:
        margin = hidden.new_full(targets.shape, offset, dtype=torch.float32) if offset else None
        found = linear_row_loss(*(hidden, head.weight, targets, phi, head.bias), target_offset=margin, **how)
    total = found.reshape(1)
    sums = [value.to(total) for value in own]
    # Where a term is not finite, the others' values must stay theirs, or a wrong one would be blamed.
    sums[0] = sums[0] + (total - total.detach()).nan_to_num() / weights[0]
    return sums


class RowLosses(Protocol):
    """What clients and other stacks of models descend on: losses of rows, unreduced.

    Attributes:
        ignore_index: Target of rows that count for nothing.
    """

    ignore_index: int

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the losses (...) of logits (..., K) with targets (...), 0 where nothing counts."""


class WeightedRows:
    """A sum of row losses with constant weights; see :class:`RowLosses`.

    Args:
        losses: With ``reduction="none"``.
        weights: Of each.
    """

    ignore_index = IGNORE_INDEX

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float]) -> None:
        self._terms = list(zip(losses, weights, strict=True))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See :class:`RowLosses`."""
        parts = [weight * loss(logits, targets) for loss, weight in self._terms]
        return torch.stack(parts).sum(0)


def row_losses(spec: LossSpec) -> RowLosses:
    """Return the unreduced row losses of a spec, one or a sum.

    Raises:
        UserError: A term is no loss of rows, or its weight changes over steps.
    """
    losses = [build_loss(term).with_reduction("none") for term in spec.terms]
    for term, loss in zip(spec.terms, losses, strict=True):
        if not isinstance(loss, RowLoss) or loss.kind != "row":
            raise UserError(f"loss.name={term.name}: a federation's clients need losses of rows")
        if term.weight.final is not None:
            raise UserError(f"loss.weight of {term.name}: clients take constant weights, not {term.weight}")
    weights = [term.weight.value for term in spec.terms]
    if weights == [1.0]:
        return cast("RowLoss", losses[0])
    return WeightedRows(losses, weights)


def build_loss(spec: LossSpec) -> Loss:
    """Return one loss of a spec, reduced as :meth:`lossworks.losses.interface.Loss.sums` needs it."""
    loss: Loss = create(spec.name, reduction="sum", ignore_index=IGNORE_INDEX, **spec.hyperparameters)
    return loss if loss.adds == "elements" else loss.with_reduction("mean")


class ElementLosses:
    """The trained loss of single elements, for telemetry; called inside a model's forward.

    Args:
        objective: What is trained. Its state is left as it is.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def probe(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return loss, gradient norm at the logits and norm of the logits, one row each.

        Args:
            outputs: With features (B, …, D).
            batch: With targets (B, …), R rows of which count.

        Returns:
            Shape (3, R): NaN where there are fewer losses than rows of logits, as of sequences, or none, as
            of whole batches.
        """
        logits = outputs.logits.float().detach().requires_grad_()
        valid = self._valid(batch)
        with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
            seen = Outputs(outputs.hidden, None, dense=logits, roles=outputs.roles)
            values = self._values(seen, batch)
            (slope,) = torch.autograd.grad(values.sum(), logits, materialize_grads=True)
        values = self._of_rows(values.detach(), valid)
        losses = logits.new_full((int(valid.sum()),), math.nan)
        losses[: len(values)] = values
        return torch.stack((losses, slope[valid].norm(dim=-1), logits.detach()[valid].norm(dim=-1)))

    def of_examples(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the mean loss of each example (B,) without building the logits; (0,) for whole batches."""
        if any(loss.adds != "elements" for loss in self._objective.terms):
            return outputs.hidden.new_zeros(0)
        values = self._values(outputs, batch, impl=self._objective.spec.impl)
        if values.dim() == 1:
            return values
        return values.flatten(1).sum(1) / self._valid(batch).flatten(1).sum(1).clamp(min=1)

    def _values(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """Return the weighted losses, unreduced where a loss is one of elements."""
        total: Tensor | float = 0.0
        for loss, weight in zip(self._objective.terms, self._objective.weights, strict=True):
            # After eval() a random loss draws nothing, and so leaves the training as it is.
            twin = loss.with_reduction("none" if loss.adds == "elements" else "mean")
            twin.training = False
            total = total + weight * twin.of(outputs, batch, **how)
        return cast("Tensor", total)

    def _valid(self, batch: Batch) -> Tensor:
        return self._objective.terms[0].valid_rows(batch["targets"])

    def _of_rows(self, values: Tensor, valid: Tensor) -> Tensor:
        if any(loss.adds != "elements" for loss in self._objective.terms):
            return values.new_zeros(0)
        return values[valid] if values.shape == valid.shape else values.flatten()
