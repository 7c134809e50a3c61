"""What every loss of the catalogue is, and what losses on rows of logits share.

A loss sums and whoever trains divides: ``reduction="sum"`` with ``count`` is what a training loop uses, so
that micro-batches and ranks of unequal size weigh every element alike.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossworks.catalogue.entry import Entry
from lossworks.data.batch import IGNORE_INDEX, NAMES, Batch
from lossworks.errors import UserError, nearest
from lossworks.head import Divergence, LogSumExp, LowRankClassifier, Target, VocabParallel, linear_row_loss
from lossworks.head.core.arguments import (
    Implementation,
    Reduction,
    all_classes,
    check_choice,
    operands,
    usable_impl,
)
from lossworks.head.core.dense_reference import dense_logits, whole_classifier
from lossworks.head.core.low_rank import taken_apart
from lossworks.head.core.valid_rows import blanked
from lossworks.losses.problems import Problem, of_classes
from lossworks.losses.rows import DenseRows, LinearRows, LogitRows, wide
from lossworks.models.interface import HeadedModel, Outputs

Addition = Literal["elements", "statistics", "batches"]
"""How the losses of parts make that of the whole.

``elements``: it is a mean of elements, whose number is known before the loss is; ``statistics``: it is a
function of sums over all parts, which :meth:`Loss.sums` gives, and trained exactly in two passes;
``batches``: every micro-batch is a batch of its own, and they weigh alike.
"""


@dataclass(frozen=True, eq=False)
class Context:
    """What a loss may look at besides prediction and target; an entry names what it requires.

    Attributes:
        weight: Factor of each element's loss, shaped like the unreduced losses, floating point.
        segments: Which sequence, step or bag each row belongs to, int64 in [0, S), shaped like the targets.
        next_probabilities: Of the next state's bins by the target network, shape (..., m).
        discounts: γ of the next state, 0 where there is none, shaped like the targets.
        teacher: A teacher's logits, shaped like the model's.
        others: What other packages' batches hold besides, by the names that they declare.
    """

    weight: Tensor | None = None
    segments: Tensor | None = None
    next_probabilities: Tensor | None = None
    discounts: Tensor | None = None
    teacher: Tensor | None = None
    others: Mapping[str, Tensor | None] = field(default_factory=dict)

    @classmethod
    def of(cls, given: dict[str, Tensor | None], owner: str, requires: tuple[str, ...]) -> "Context":
        """Return the context of keyword arguments.

        Raises:
            UserError: A name is unknown, or one that is required is missing.
        """
        own = [field.name for field in fields(cls) if field.name != "others"]
        known = [*own, *(name for name in NAMES if name not in own)]
        for name in given:
            if name not in known:
                raise UserError(f"{owner}: no input {name}; did you mean {nearest(name, known) or known}?")
        for name in requires:
            if given.get(name) is None:
                raise UserError(f"{owner}: needs the input {name}")
        others = {name: value for name, value in given.items() if name not in own}
        return cls(**{name: given.get(name) for name in own}, others=others)


@dataclass(frozen=True, eq=False)
class Taught:
    """A loss of rows that is a multiple of their divergence from a teacher.

    Attributes:
        divergence: With the teacher's features and head.
        factor: What it is multiplied by.
    """

    divergence: Divergence
    factor: float


class Loss(Entry, nn.Module):
    """A loss as a module; ``forward`` takes predictions and targets and whatever ``Context`` holds.

    Its parameters are trained with the model, without decay; FSDP splits those that have an axis at least.

    Args:
        reduction: ``"sum"``, ``"none"``, or ``"mean"``: the sum divided by the sum of the weights of what
            counts; 0 where nothing does.
        ignore_index: Target of elements that count for nothing.
        hyperparameters: Those that the class declares.

    Raises:
        UserError: A name is unknown or a value out of range.
    """

    section: ClassVar[str] = "losses"
    adds: ClassVar[Addition] = "elements"

    def __init__(
        self, *, reduction: Reduction = "mean", ignore_index: int = IGNORE_INDEX, **values: Any
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.reduction, self.ignore_index = reduction, ignore_index
        self.set_hyperparameters(values)

    def with_reduction(self, reduction: Reduction) -> Self:
        """Return the same loss, with the same parameters and state, reduced in another way."""
        twin = copy(self)
        twin.reduction = reduction
        return twin

    def fit_to(self, model: HeadedModel) -> None:
        """Make parameters of its own whose shapes depend on the model, once, before the model is trained.

        Args:
            model: Before it is distributed; what it computes is left as it is.
        """
        del model

    def own_logits(self, outputs: Outputs, valid: Tensor) -> Tensor | None:
        """Return the logits (..., K) of a head of the loss's own, for analyses; None if it has none.

        Args:
            outputs: Of the model.
            valid: Which rows count, bool (...).
        """
        del outputs, valid
        return None

    @property
    def learns(self) -> bool:
        """Whether it has parameters of its own, or will have once it has seen the model."""
        return type(self).fit_to is not Loss.fit_to or next(self.parameters(), None) is not None

    def prediction(self, outputs: Outputs) -> Tensor:
        """Return what ``forward`` takes of a model's outputs: the logits, unless a kind of loss differs."""
        return outputs.logits

    def given(self, batch: Batch) -> dict[str, Tensor]:
        """Return what a batch holds of the further inputs: weights, and what the loss requires."""
        return {name: batch[name] for name in ("weight", *self.requires) if name in batch}

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """Return the loss of a model's outputs for a batch, reduced as the loss is.

        Args:
            outputs: Of the model.
            batch: With ``targets``, and whatever the loss requires.
            how: How a linear head is computed, ``impl`` and ``vocab_parallel``, for losses that can do
                without the logits; others build them.
        """
        del how
        found: Tensor = self(self.prediction(outputs), batch["targets"], **self.given(batch))
        return found

    def beside_teacher(
        self, logits: Tensor, targets: Tensor, given: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor, Tensor, Context]:
        """Return dense logits and a teacher's, (..., K) each, which rows count, bool (...), and the context.

        The logits are float32 at least, 0 in rows that don't count, and the teacher's have no gradient.

        Args:
            logits: Shape (..., K).
            targets: Shape (...).
            given: Fields of :class:`Context`, ``teacher`` (..., K) among them.

        Raises:
            UserError: There are no logits of a teacher, or the shapes don't fit.
        """
        context = self.context(given)
        if context.teacher is None:
            raise UserError(f"{self.slug}: needs the teacher's logits: teacher=…")
        self.require_shape("teacher", context.teacher, logits)
        self.require_shape("targets", targets, logits[..., 0])
        valid = self.valid_rows(self.counting(targets, context))
        z, t = (wide(blanked(x, ~valid)) for x in (logits, context.teacher.detach()))
        return z, t, valid, context

    def taught(self, outputs: Outputs) -> Taught | None:
        """Return what a loss is that can share a pass over both heads with row losses; None if it can't."""
        del outputs
        return None

    def sums(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """Return numbers (S,) that add up over rows, micro-batches, ranks and clients; arguments as ``of``.

        Unless ``adds`` says otherwise it is the summed loss, of a loss that is reduced by ``"sum"``; where
        each micro-batch is a batch of its own, it is the loss of that one, reduced by ``"mean"``.
        """
        return self.of(outputs, batch, **how).reshape(1)

    def advance(self, sums: Tensor) -> None:
        """Go on by a step of training, after its update; every rank calls.

        Args:
            sums: Of the whole step, as :meth:`sums` gives them, (S,) float64.
        """
        del sums

    def value(self, sums: Tensor, count: float) -> Tensor:
        """Return the loss of sums (S,) over all parts, a scalar; 0 where nothing counts.

        Args:
            sums: Of all parts, added.
            count: :meth:`elements` of all parts, added.
        """
        return sums[0] / count if count else 0.0 * sums[0]

    def valid_rows(self, targets: Tensor) -> Tensor:
        """Return which targets (...) count, bool (...): classes other than ``ignore_index``, or no NaN."""
        return ~targets.isnan() if targets.is_floating_point() else targets != self.ignore_index

    def count(self, targets: Tensor) -> Tensor:
        """Return how many elements of a summed loss count, by which a training loop divides."""
        return self.valid_rows(targets).sum()

    def elements(self, batch: Batch) -> float:
        """Return what ``sums`` of a batch are divided by: elements, or 1 for a batch of its own."""
        if self.adds == "batches":
            return float(self.valid_rows(batch["targets"]).any())
        return float(self.count(batch["targets"]))

    def counting(self, targets: Tensor, context: Context) -> Tensor:
        """Return targets (...) that say of all that weighs 0, too, that it counts for nothing.

        So what is there may be anything, NaN included, as beside an ignored target.
        """
        if context.weight is None:
            return targets
        return self._without(targets, context.weight.detach() == 0)

    def _without(self, targets: Tensor, nothing: Tensor) -> Tensor:
        """Return targets (...) of which those don't count whose leading axes' ``nothing``, bool, says so."""
        if nothing.shape != targets.shape[: nothing.dim()]:
            return targets  # a weight of a wrong shape is refused by name where it is used
        unknown = torch.nan if targets.is_floating_point() else self.ignore_index
        return targets.masked_fill(
            nothing.reshape(*nothing.shape, *(1,) * (targets.dim() - nothing.dim())), unknown
        )

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """Return a random problem in float64 that fits this loss, by which it is audited: logits and classes.

        A kind of loss that takes something else makes its own.

        Args:
            rows: Rows, sequences or examples, two or more; rows 2i and 2i + 1 may belong together.
            generator: Of the numbers.
        """
        return of_classes(rows, generator)

    def context(self, given: dict[str, Tensor | None]) -> Context:
        """Return the typed context of ``forward``'s keyword arguments."""
        return Context.of(given, self.slug, self.requires)

    def reduce(self, values: Tensor, divisors: Tensor) -> Tensor:
        """Reduce losses that are weighted already, 0 where nothing counts.

        Args:
            values: Shape (...).
            divisors: What each element weighs in a mean, shape (...), 0 where it doesn't count.
        """
        return values if self.reduction == "none" else self.of_total(values.sum(), divisors)

    def of_total(self, total: Tensor, divisors: Tensor) -> Tensor:
        """Return a sum of losses as it is, or their mean; arguments as for :meth:`reduce`."""
        return total if self.reduction == "sum" else _divided(total, divisors)

    def weights(self, valid: Tensor, context: Context, like: Tensor) -> Tensor:
        """Return what each element weighs, 0 where it doesn't count: shaped like ``valid`` (...), bool.

        Raises:
            UserError: The context's weights have another shape.
        """
        if context.weight is None:
            return valid.to(like)
        self.require_shape("weight", context.weight, valid)
        return torch.where(valid, context.weight.detach().to(like), 0)

    def reduce_elements(self, values: Tensor, valid: Tensor, context: Context) -> Tensor:
        """Return the losses of valid elements, weighted and reduced; ``values`` and ``valid`` are (...)."""
        weight = self.weights(valid, context, values)
        # Chosen and not multiplied: a formula may be infinite in a row that counts for nothing.
        return self.reduce(torch.where(weight != 0, values, 0) * weight, weight)

    def require_shape(self, what: str, given: Tensor, like: Tensor) -> None:
        """Refuse a tensor of another shape by name.

        Raises:
            UserError: With both shapes.
        """
        if given.shape != like.shape:
            raise UserError(f"{self.slug}: {what} {tuple(given.shape)} must be {tuple(like.shape)}")


class RowLoss(Loss):
    """A loss of each row of logits through a few statistics, with the logits or without them.

    A subclass implements :meth:`phi` if the target's logit and one logsumexp are all it needs (it then costs
    the three products of plain cross-entropy), and :meth:`values` otherwise. It names in ``per_row`` the
    hyperparameters that its formula takes as tensors, too, so that models trained at once may differ in them;
    see :func:`of_members`.
    """

    kind: ClassVar[str] = "row"
    example: ClassVar[str] = "lossworks train jobs/specs/digits.yaml loss={slug}"
    without_logits = True
    products = 3.0

    @property
    def per_row(self) -> tuple[str, ...]:
        """Names of the hyperparameters that may be tensors which broadcast with the targets."""
        return ()

    @property
    def lse_temperature(self) -> float:
        """The τ of the logsumexp that ``phi`` takes, τ·log Σ exp(z/τ)."""
        return 1.0

    @property
    def target_offset(self) -> float:
        """What is added to the target's logit before anything else is taken: a margin."""
        return 0.0

    @property
    def needs_logits(self) -> bool:
        """Whether these hyperparameters can only be had with the logits."""
        return False

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:
        """Return the losses of rows, each from its own two numbers.

        Args:
            target: z_y with its offset, shape (T,).
            logsumexp: τ·log Σ exp(z/τ), shape (T,).
            classes: K.
        """
        raise NotImplementedError

    def values(self, rows: LogitRows, context: Context) -> Tensor:  # noqa: ARG002 - others look at it
        """Return the losses of all elements; what they are in rows that don't count does not matter."""
        temperature, offset = (flat(value, rows) for value in (self.lse_temperature, self.target_offset))
        target, lse = rows(Target(), LogSumExp(temperature), offset=offset)
        return self.phi(target, lse, rows.classes)

    def prepare(self, logits: Tensor) -> Tensor:
        """Return what the loss is taken of, where that isn't the logits (..., K) themselves."""
        return logits

    def valid(self, rows: LogitRows, context: Context) -> Tensor:  # noqa: ARG002
        """Return which elements count, bool, shaped like the unreduced losses."""
        return rows.valid

    @property
    def joint(self) -> bool:
        """Whether ``phi`` is all there is, so that several such losses share one pass over the logits."""
        return self.folds and not self.needs_logits

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; without the logits where there is a head."""
        head = outputs.head
        if head is None:
            return super().of(outputs, batch)
        return self.linear(
            outputs.hidden,
            head.weight,
            batch["targets"],
            head.bias,
            softcap=head.softcap,
            **{**how, **self.given(batch)},
        )

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: z, shape (..., K), floating point; half precision is read in float32.
            targets: y in [0, K) or ``ignore_index``, int64, shape (...).
            given: Fields of :class:`Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.
        """
        context = self.context(given)
        targets = self.counting(targets, context)
        logits = blanked(wide(logits), targets == self.ignore_index)
        return self._finish(DenseRows(self.prepare(logits), targets, self.ignore_index), context)

    def linear(
        self,
        e: Tensor,
        c: Tensor | LowRankClassifier,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        impl: Implementation = "auto",
        vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
        **given: Tensor | None,
    ) -> Tensor:
        """Return the loss of the logits E·Cᵀ + b without building them.

        Args:
            e: E, shape (..., D).
            c: C, shape (K, D), or a :class:`LowRankClassifier`.
            targets: y in [0, K) or ``ignore_index``, int64, shape (...).
            bias: b, shape (K,), or None.
            softcap: Cap of the logits' magnitude, or None.
            impl: As for :func:`lossworks.linear_cross_entropy`; ``"reference"`` builds the logits, and
                ``"auto"`` does where the hyperparameters leave no other way (``needs_logits``).
            vocab_parallel: As there.
            given: Fields of :class:`Context`.

        Raises:
            UserError: Something doesn't fit together, or the logits are needed and ``impl`` builds none.
        """
        features, own, frozen = taken_apart(e, c)
        context, impl = self.context(given), usable_impl(impl, features, own, targets, bias)
        targets = self.counting(targets, context)
        if impl == "reference" or (self.needs_logits and impl == "auto" and vocab_parallel is None):
            head = operands(blanked(features, targets == self.ignore_index), own, bias, None, frozen)
            logits = dense_logits(head.e, whole_classifier(head), bias, softcap)
            return self.forward(logits.reshape(*targets.shape, -1), targets, **given)
        if self.needs_logits:
            raise UserError(
                f"{self.slug}: {self.extra_repr()} needs all logits: impl={impl!r} must be auto or "
                "reference, and vocab_parallel None"
            )
        classes = all_classes(operands(features, own, bias, vocab_parallel, frozen))
        options = {"softcap": softcap, "impl": impl}
        rows = LinearRows(
            *(e, c, targets, bias, self.ignore_index),
            softcap=softcap,
            impl=impl,
            vocab_parallel=vocab_parallel,
            classes=classes,
        )
        if self.reduction == "none" or vocab_parallel is not None or not self.folds:
            return self._finish(rows, context)
        return self._folded(rows, context, (e, c, targets), bias, options)

    @property
    def folds(self) -> bool:
        """Whether ``phi`` is all there is, so that the gradient can be formed in the forward pass.

        The pass gives no gradient to parameters of the loss itself; where there are any, autograd has to.
        """
        return type(self).values is RowLoss.values and not self.learns

    def _folded(
        self,
        rows: LinearRows,
        context: Context,
        tensors: tuple[Tensor, Tensor | LowRankClassifier, Tensor],
        bias: Tensor | None,
        options: dict[str, Any],
    ) -> Tensor:
        weight = self.weights(self.valid(rows, context), context, wide(tensors[0][:0]))
        offset = self.target_offset
        total = linear_row_loss(
            *tensors,
            lambda target, lse: self.phi(target, lse, rows.classes),
            bias,
            ignore_index=self.ignore_index,
            temperature=self.lse_temperature,
            target_offset=torch.full_like(weight, offset) if offset else None,
            token_weight=weight,
            **options,
        )
        return self.of_total(total, weight)

    def _finish(self, rows: LogitRows, context: Context) -> Tensor:
        return self.reduce_elements(self.values(rows, context), self.valid(rows, context), context)


def of_members(losses: Sequence[RowLoss], dtype: torch.dtype = torch.float32) -> RowLoss:
    """Return one loss of logits (M, B, K) that is ``losses[i]`` of the i-th of M parts.

    Args:
        losses: M of one class, alike in all that :attr:`RowLoss.per_row` of the first doesn't name.
        dtype: Of the logits.

    Raises:
        UserError: They differ in more.

    Example:
        >>> from lossworks.losses import create
        >>> both = of_members([create("ldr", temperature=t, reduction="none") for t in (0.5, 2.0)])
        >>> both(torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)).shape
        torch.Size([2, 3])
    """
    first = losses[0]
    together = copy(first)
    for name in first.settings():
        values = [getattr(loss, name) for loss in losses]
        if all(value == values[0] for value in values):
            continue
        if name not in first.per_row:
            raise UserError(f"{first.slug}: {name} must be alike in losses that are taken together")
        object.__setattr__(together, name, torch.tensor(values, dtype=dtype)[:, None])
    return together


def flat(value: Tensor | float, rows: LogitRows) -> Tensor | float:
    """Return a hyperparameter as the statistics of rows take it: one number, or one each, flat."""
    return value.expand(rows.targets.shape).reshape(-1) if isinstance(value, Tensor) else value


def active(value: Tensor | float) -> bool:
    """Return whether a weight can be other than 0."""
    return isinstance(value, Tensor) or value != 0


def _divided(total: Tensor, divisors: Tensor) -> Tensor:
    """Return a sum over the sum of divisors, which may be negative; 0 where that is 0."""
    divisor = divisors.sum()
    return torch.where(divisor != 0, total / torch.where(divisor != 0, divisor, 1), 0.0 * total)
