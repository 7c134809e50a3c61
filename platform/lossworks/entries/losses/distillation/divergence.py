"""Distillation: a divergence of the model's probabilities from a teacher's, from two heads in one pass."""

from typing import Any, ClassVar, cast, get_args

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, choice, integer, number, switch
from lossworks.data.batch import Batch
from lossworks.head import (
    Divergence,
    TopKDivergence,
    linear_row_statistics,
    linear_teacher_loss,
    linear_top_k,
)
from lossworks.head.core.divergences import DivergenceKind, parts, with_rest
from lossworks.head.core.valid_rows import blanked
from lossworks.losses.interface import Loss, Taught
from lossworks.losses.problems import Problem, of_classes
from lossworks.losses.rows import wide
from lossworks.models.interface import Head, Outputs


class Distillation(Loss):
    """Distillation: a divergence of the model's probabilities from a teacher's, at one temperature.

    With p = softmax(z/τ) of the model's logits and q = softmax(t/τ) of the teacher's it is, for each row,
    ``forward-kl`` KL(q‖p), which spreads the model over all that the teacher thinks possible; ``reverse-kl``
    KL(p‖q), which draws it to what the teacher thinks likely; ``jensen-shannon`` β KL(q‖m) + (1 − β) KL(p‖m)
    with m = β q + (1 − β) p, which lies between them (Agarwal et al. 2024, equation 1): near β = 0 it is β
    times the first, near 1 it is 1 − β times the second; or ``total-variation`` ½ Σ |p − q|. With ``top_k``
    the teacher's k likeliest classes count one by one and all others together as one class.

    The gradient by the logits is about 1/τ² of that at τ = 1, so Hinton et al. (section 2) multiply by τ²,
    which keeps the balance with other terms of a sum; ``scaled: false`` leaves that out, as TRL and Liger do.

    Use it where a larger model of the same vocabulary is at hand, alone or in a sum with cross-entropy. The
    teacher may have any width and architecture, but must have the model's classes. A small labelled set and a
    teacher that has seen no more of the task than the model are no case for it: it then teaches its errors.
    """

    slug = "distillation"
    kind: ClassVar[str] = "distillation"
    formula = "τ² D(q, p), p = softmax(z/τ), q = softmax(t/τ) of the teacher's logits t"
    paper = Paper(
        "Distilling the Knowledge in a Neural Network",
        "Hinton, Vinyals, Dean",
        2015,
        "section 2; On-Policy Distillation of Language Models, Agarwal et al. 2024, equation 1",
    )
    roles = ("teacher",)
    without_logits = True
    products = 4.0
    invariances = ("shift",)
    flags = ("plain-torch",)
    example: ClassVar[str] = "lossworks train jobs/specs/distil.yaml roles.teacher=RUN loss={slug}"

    divergence: DivergenceKind = choice(
        "forward-kl",
        "D: which divergence",
        get_args(DivergenceKind),
        search=True,
    )
    temperature: float = number(
        1.0, "τ of both softmaxes; large ones compare logits", gt=0, search=(0.5, 8.0), log=True
    )
    beta: float = number(
        0.5, "β: share of the teacher in the mixture of jensen-shannon, which alone reads it", gt=0, lt=1
    )
    top_k: int | None = integer(
        None, "k likeliest classes of the teacher, the others as one; null for all", ge=1, optional=True
    )
    scaled: bool = switch(True, "multiply by τ²")

    @property
    def factor(self) -> float:
        """What the divergence is multiplied by."""
        return self.temperature**2 if self.scaled else 1.0

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; with a teacher's logits."""
        plain = of_classes(rows, generator)
        teacher = torch.randn(plain.prediction.shape, dtype=torch.float64, generator=generator)
        return plain.given(teacher=2 * teacher)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; without the logits of model and teacher where both have a head."""
        theirs, targets, given = outputs.roles["teacher"], batch["targets"], self.given(batch)
        if outputs.head is None or theirs.head is None or how.get("impl") == "reference":
            found: Tensor = self(outputs.logits, targets, teacher=theirs.logits, **given)
            return found
        context = self.context(dict(given))
        targets = self.counting(targets, context)
        head, valid = outputs.head, self.valid_rows(targets)
        how = {"ignore_index": self.ignore_index, "softcap": head.softcap, **how}
        taught = self.taught(outputs)
        if self.reduction != "none" and taught is not None:
            weight = self.weights(valid, context, wide(outputs.hidden[:0]))
            total = linear_teacher_loss(
                *(outputs.hidden, head.weight, targets, taught.divergence),
                bias=head.bias,
                token_weight=weight,
                **how,
            )
            return self.of_total(self.factor * total, weight)
        statistic = self._best(theirs, valid) if taught is None else taught.divergence
        (values,) = linear_row_statistics(
            *(outputs.hidden, head.weight, targets, head.bias), statistics=[statistic], **how
        )
        return self.reduce_elements(self.factor * values, valid, context)

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: z, shape (..., K), floating point; half precision is read in float32.
            targets: Classes, or ``ignore_index`` where nothing counts, int64, shape (...).
            given: ``teacher``, the teacher's logits t, shape (..., K), and fields of :class:`Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: A shape doesn't fit, or there is no teacher.
        """
        z, t, valid, context = self.beside_teacher(logits, targets, given)
        return self.reduce_elements(self.factor * self._dense(z, t), valid, context)

    def taught(self, outputs: Outputs) -> Taught | None:
        """See :meth:`Loss.taught`; all classes count, or the best alone, which takes another statistic."""
        theirs = outputs.roles["teacher"]
        head = theirs.head
        if head is None or (self.top_k is not None and self.top_k < len(head.weight)):
            return None
        plain = (head.weight, head.bias, head.softcap, self.temperature, self.beta)
        return Taught(Divergence(self.divergence, theirs.hidden, *plain), self.factor)

    def _best(self, theirs: Outputs, valid: Tensor) -> TopKDivergence:
        """Return what is taken of rows, of which ``valid`` (...) count, with a teacher's best classes."""
        head = cast("Head", theirs.head)
        best = linear_top_k(
            *(blanked(theirs.hidden, ~valid), head.weight, cast("int", self.top_k), head.bias),
            softcap=head.softcap,
            temperature=self.temperature,
        )
        return TopKDivergence(
            *(self.divergence, best.log_probabilities, best.classes, self.temperature, self.beta)
        )

    def _dense(self, z: Tensor, t: Tensor) -> Tensor:
        """Return the divergences (...) of logits (..., K)."""
        log_p, log_q = ((x / self.temperature).log_softmax(-1).flatten(0, -2) for x in (z, t.to(z)))
        if self.top_k is not None and self.top_k < z.shape[-1]:
            log_q, classes = log_q.topk(self.top_k)
            log_p, log_q = with_rest(log_p.gather(1, classes)), with_rest(log_q)
        return parts(self.divergence, log_p, log_q, self.beta).sum(1).reshape(z.shape[:-1])
