"""Distillation of logits into a head of its own, which leaves the classifier to the labels."""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.adapters.torch_private import without_values
from lossworks.catalogue.declaration import Paper, choice, number
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import blanked
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem, of_classes
from lossworks.losses.rows import wide
from lossworks.models.interface import HeadedModel, Outputs

_HIDDEN, _DROPOUT, _MOMENTUM, _EPS = 200, 0.1, 0.1, 1e-5


def log_cosh_gap(gap: Tensor) -> Tensor:
    """Return Σ_k log cosh(d_k/2) of gaps d (..., K), shape (...): KL of a fair coin from one of odds e^d.

    In this form it is finite at any gap, with the derivative tanh(d/2)/2.
    """
    return (torch.logaddexp(gap / 2, -gap / 2) - math.log(2)).sum(-1)


class AuxiliaryHead(nn.Module):
    """A second head: a linear map, or a perceptron with 200 features, dropout of 0.1 and batch normalisation.

    Args:
        width: D, features of the model.
        classes: K.
        kind: ``linear`` or ``mlp``.
        seed: Of its first parameters.
    """

    moments: Tensor

    def __init__(self, width: int, classes: int, kind: str, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            within = _HIDDEN if kind == "mlp" else width
            self.first = nn.Linear(width, within) if kind == "mlp" else None
            self.last = nn.Linear(within, classes)
        if kind == "mlp":
            self.scale, self.shift = nn.Parameter(torch.ones(within)), nn.Parameter(torch.zeros(within))
            self.register_buffer("moments", torch.stack((torch.zeros(within), torch.ones(within))))

    def logits(self, features: Tensor, valid: Tensor, *, training: bool) -> Tensor:
        """Return logits (B, K).

        Args:
            features: Shape (B, D).
            valid: Which rows batch normalisation counts, bool, shape (B,).
            training: Whether it draws, and normalises by this batch.
        """
        if self.first is None:
            return self.last(features)  # type: ignore[no-any-return]
        x = F.dropout(self.first(features), _DROPOUT, training)
        mean, variance = self._of_batch(x, valid) if training else self.moments.unbind()
        x = (x - mean) * (variance + _EPS).rsqrt() * self.scale + self.shift
        return self.last(x.relu())  # type: ignore[no-any-return]

    def _of_batch(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance of the rows that count, each (H,), and move the kept ones to them."""
        weight = valid.to(x.dtype)[:, None]
        count = weight.sum().clamp(min=1)
        mean = (weight * x).sum(0) / count
        variance = (weight * (x - mean).square()).sum(0) / count
        with torch.no_grad():
            found = torch.stack((mean, variance * count / (count - 1).clamp(min=1)))
            found = torch.where(valid.any(), found, self.moments)
            if dist.is_initialized() and dist.get_world_size() > 1:
                # The same on every rank, so that a checkpoint of one of them is that of all.
                dist.all_reduce(found)
                found = found / dist.get_world_size()
            self.moments.lerp_(found.to(self.moments), _MOMENTUM)
        return mean, variance


class DualHeadDistillation(Loss):
    """Dual-head distillation: a second head learns the teacher's logits, and both heads shape the features.

    With s the logits of a head of the loss's own on the model's features and t the teacher's, it is τ² times
    the sum over classes of KL(Bernoulli(½) ‖ Bernoulli(σ(d))), d = (s − t)/τ: (s − t)²/8 for small gaps.
    It gives the model's own head no gradient, so in a sum with cross-entropy the classifier is trained by the
    labels alone: ``loss: [cross-entropy, {name: dual-head-distillation, weight: α}]``; as the sum over
    classes grows with their number, so should 1/α. ``methods: [gradient-alignment]`` takes out what of it
    runs against cross-entropy. The second head is left out of exports. Batch normalisation of the perceptron
    sees a worker's micro-batch.

    Use it where a teacher's logits say more than its probabilities and a classifier on labels must not follow
    them, with an α that keeps it below cross-entropy. It is no cure for a small model: in the study
    dual-head, with 8 features, a teacher of large logits and α = 1, the second head came twice as near to the
    teacher as the classifier, and the classifier lost eight points of accuracy; ``distillation`` lost one.
    """

    slug = "dual-head-distillation"
    kind: ClassVar[str] = "distillation"
    formula = "τ² Σ_k log cosh(d_k/2), d = (s − t)/τ, s of a second head, t the teacher's logits"
    paper = Paper(
        "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        "Yang et al.",
        2025,
    )
    roles = ("teacher",)
    example: ClassVar[str] = (
        'lossworks train jobs/specs/digits.yaml loss="[cross-entropy, {slug}]" roles.teacher=RUN'
    )

    temperature: float = number(2.0, "τ: gaps below it are squared", gt=0, search=(1.0, 8.0), log=True)
    head: Literal["linear", "mlp"] = choice(
        "linear", "the second head: a linear map or a perceptron", ("linear", "mlp"), search=True
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.auxiliary: AuxiliaryHead | None = None

    def fit_to(self, model: HeadedModel) -> None:
        """See :meth:`Loss.fit_to`; its first parameters follow from the model's own."""
        weight = model.head().weight
        classes, width = weight.shape
        first = weight.detach().flatten()[:1].float()
        seed = 0 if without_values(weight) else int(first.view(torch.int32)) & 0x7FFFFFFF
        self.auxiliary = AuxiliaryHead(width, classes, self.head, seed).to(weight.device)

    def own_logits(self, outputs: Outputs, valid: Tensor) -> Tensor:
        """See :meth:`Loss.own_logits`.

        Raises:
            UserError: There is no second head yet.
        """
        if self.auxiliary is None:
            raise UserError(f"{self.slug}: has no second head; call fit_to(model) first")
        features = blanked(wide(outputs.hidden), ~valid)
        return self.auxiliary.logits(features, valid, training=self.training)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; logits of the second head, and a teacher's."""
        plain = of_classes(rows, generator)
        teacher = torch.randn(plain.prediction.shape, dtype=torch.float64, generator=generator)
        return plain.given(teacher=2 * teacher)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; the second head reads the features, and the model's logits are not built."""
        del how
        given = self.given(batch)
        valid = self.valid_rows(self.counting(batch["targets"], self.context(dict(given))))
        with torch.autocast(outputs.hidden.device.type, enabled=False):
            own = self.own_logits(outputs, valid)
            found: Tensor = self(own, batch["targets"], teacher=outputs.roles["teacher"].logits, **given)
        return found

    def forward(self, own: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of the second head's logits.

        Args:
            own: s, shape (..., K), floating point; half precision is read in float32.
            targets: Classes, or ``ignore_index`` where nothing counts, int64, shape (...).
            given: ``teacher``, the teacher's logits t, shape (..., K), and fields of :class:`Context`.

        Returns:
            A scalar, or (...) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: A shape doesn't fit, or there is no teacher.
        """
        s, t, valid, context = self.beside_teacher(own, targets, given)
        values = self.temperature**2 * log_cosh_gap((s - t.to(s)) / self.temperature)
        return self.reduce_elements(values, valid, context)
