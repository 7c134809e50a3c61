"""Single image unlearning: learn a wrong answer, and stay near the old model but for the forgotten names.

Shapes: B rows, M masked classes, T tokens, V classes.
"""

from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.head import Divergence, Gathered, LogSumExp, linear_row_statistics
from lossworks.head.core.arguments import Implementation
from lossworks.head.core.valid_rows import blanked
from lossworks.losses.problems import CLASSES, Problem
from lossworks.losses.rows import wide
from lossworks.losses.unlearning import RETAIN, UnlearningLoss, mean_of, nats_and_tokens
from lossworks.models.interface import Head, Outputs

INSTEAD = 2
"""The candidate that holds the wrong answer to what is to be forgotten."""


def masked_kl(
    student: tuple[Tensor, Head],
    teacher: tuple[Tensor, Head],
    targets: Tensor,
    masked: Tensor,
    impl: Implementation,
) -> Tensor:
    """Return Σ_{v kept} p_v (log p_v − log q_v) of every token, (T,); 0 where a target is -100.

    It is the divergence of all classes less the terms of the few masked ones. Its least value for given p is
    P·log P ≤ 0 with P the kept classes' share of p, at q = p/P on them.

    Args:
        student: Features (T, D) and head of q.
        teacher: Features (T, D') and head of p, without a gradient.
        targets: int64 (T,); those that are -100 count for nothing.
        masked: Classes that are left out, distinct, int64 (M,).
        impl: As for :func:`lossworks.linear_cross_entropy`.
    """
    (e, head), (their_e, their_head) = student, teacher
    classes = masked.expand(len(targets), -1)
    whole, z, lse = linear_row_statistics(
        *(e, head.weight, targets, head.bias),
        statistics=[
            Divergence("forward-kl", their_e, their_head.weight, their_head.bias, their_head.softcap),
            Gathered(classes),
            LogSumExp(),
        ],
        softcap=head.softcap,
        impl=impl,
    )
    with torch.no_grad():
        their_z, their_lse = linear_row_statistics(
            *(their_e, their_head.weight, targets, their_head.bias),
            statistics=[Gathered(classes), LogSumExp()],
            softcap=their_head.softcap,
            impl=impl,
        )
    log_p, log_q = their_z - their_lse[:, None], z - lse[:, None]
    left_out = (log_p.exp() * (log_p - log_q)).sum(1)
    return torch.where(targets != IGNORE_INDEX, whole - left_out, 0)


class SIU(UnlearningLoss):
    """SIU: cross-entropy of a wrong answer and of what stays, with a divergence that is blind to old names.

    The divergence is from the model before (``roles.reference``), over the tokens of what is to stay, and
    leaves out the classes of the old answers: the masked sum is no divergence, and pushes them down wherever
    they stand. Negative values are usual. The batch's third candidate is the wrong answer.

    Use it to make a model give another answer to a few prompts in a handful of steps. Not where the old
    answers' tokens are words of everyday use: their probability falls everywhere.
    """

    slug = "siu"
    formula = "a CE + b Σ_t S_t Σ_v K_v p_v (log p_v - log q_v) / Σ_t S_t, p of the model before"
    paper = Paper(
        "Single Image Unlearning: Efficient Machine Unlearning in Multimodal Large Language Models",
        "Li et al.",
        2024,
        "equations 3 to 5",
    )
    roles = ("reference",)
    requires = ("masked_classes",)
    candidates: ClassVar[int] = 3
    example: ClassVar[str] = (
        "lossworks train jobs/specs/unlearn.yaml start=RUN loss={slug} roles.reference=start"
    )

    ce: float = number(0.9, "a: weight of the cross-entropy", ge=0, search=(0.5, 1.0))
    dmk: float = number(0.75, "b: weight of the masked divergence", ge=0, search=(0.25, 1.0))

    def token_sums(self, outputs: Outputs, targets: Tensor, batch: Batch, impl: Implementation) -> Tensor:
        """Return nats and tokens of the wrong answers and of what stays, divergence and its tokens, (4,)."""
        nats = nats_and_tokens(outputs, targets, INSTEAD, impl) + nats_and_tokens(
            outputs, targets, RETAIN, impl
        )
        kept = targets[:, RETAIN].reshape(-1)
        masked, place = batch["masked_classes"], (slice(None), RETAIN)
        values = masked_kl(
            headed(outputs.at(place), kept),
            headed(self._before(outputs, batch).at(place), kept),
            kept,
            masked[masked >= 0].unique(),
            impl,
        )
        return torch.cat((nats, torch.stack((values.sum(), (kept != self.ignore_index).sum().to(values)))))

    def _before(self, outputs: Outputs, batch: Batch) -> Outputs:
        """Return what the model before says: the companion's outputs, or logits that were given as such."""
        if "reference" in outputs.roles:
            return outputs.roles["reference"]
        if "teacher" not in batch:
            raise UserError(
                f"{self.slug}: needs the outputs of a companion named reference, or teacher=logits"
            )
        logits = batch["teacher"].detach()
        return Outputs(logits, None, dense=logits)

    def of_sums(self, sums: Tensor) -> Tensor:
        """See :meth:`UnlearningLoss.of_sums`."""
        return self.ce * mean_of(sums[0], sums[1]) + self.dmk * mean_of(sums[2], sums[3])

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        found = super().problem(rows, generator)
        teacher = torch.randn(found.prediction.shape, dtype=torch.float64, generator=generator)
        masked = torch.tensor([[1, CLASSES - 1]]).expand(rows, -1)
        return found.given(masked_classes=masked, teacher=teacher)


def headed(outputs: Outputs, targets: Tensor) -> tuple[Tensor, Head]:
    """Return features (T, D) and the head of outputs; logits are features to a head that leaves them alone.

    Args:
        outputs: Of B sequences of L tokens, T = B·L.
        targets: (T,) int64; what stands beside those that are -100 may be anything.
    """
    if outputs.head is not None:
        return outputs.hidden.flatten(0, -2), outputs.head
    logits = blanked(wide(outputs.logits).flatten(0, -2), targets == IGNORE_INDEX)
    return logits, Head(torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device))
