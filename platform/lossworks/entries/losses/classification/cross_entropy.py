"""Cross-entropy with label smoothing, class weights and the log-Z term."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Case, Paper, number, numbers, switch
from lossworks.errors import UserError
from lossworks.head import LogSumExp, LowRankClassifier, linear_cross_entropy
from lossworks.head.core.valid_rows import blanked
from lossworks.losses.interface import RowLoss, active
from lossworks.losses.rows import DenseRows, wide


class CrossEntropy(RowLoss):
    """Cross-entropy with label smoothing and class weights.

    As :func:`torch.nn.functional.cross_entropy`, weighted mean and smoothing included.
    """

    slug = "cross-entropy"
    formula = "(1-α) w_y (lse - z_y) + (α/K) Σ_k w_k (lse - z_k)"
    paper = Paper(
        "Rethinking the Inception Architecture for Computer Vision", "Szegedy et al.", 2016, "section 7"
    )
    invariances: ClassVar[tuple[str, ...]] = ("shift",)
    cases = (Case({"label_smoothing": 0.0}, "comp-sum", {"tau": 1.0}),)

    label_smoothing: float = number(
        0.0,
        "α: probability spread over all classes; 0 is plain, 1 ignores the label",
        ge=0,
        le=1,
        search=(0, 0.3),
    )
    class_weight: tuple[float, ...] | None = numbers(
        None, "w: one factor a class; null weighs all alike", ge=0, optional=True
    )

    z_loss = 0.0

    @property
    def per_row(self) -> tuple[str, ...]:
        """The name of the smoothing α."""
        return ("label_smoothing",)

    @property
    def joint(self) -> bool:
        """Whether only the label and the logsumexp count."""
        return not active(self.label_smoothing) and self.class_weight is None

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:  # noqa: ARG002
        """See :meth:`RowLoss.phi`; without smoothing and class weights."""
        plain = logsumexp - target
        return plain + self.z_loss * logsumexp.square() if active(self.z_loss) else plain

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """See :meth:`RowLoss.forward`."""
        context = self.context(given)
        targets = self.counting(targets, context)
        logits = blanked(wide(logits), targets == self.ignore_index)
        rows = DenseRows(logits, targets, self.ignore_index)
        w = self._class_weights(logits, rows.classes)
        values = self._smoothed(logits, targets, w)
        if active(self.z_loss):
            (lse,) = rows(LogSumExp())
            values = values + self.z_loss * lse.square()
        if self.reduction == "none" and context.weight is None:
            return values  # 0 already where a row doesn't count
        weight = self.weights(rows.valid, context, values)
        divisors = weight if w is None else weight * w[torch.where(rows.valid, targets, 0)]
        return self.reduce(values * weight, divisors)

    def _smoothed(self, logits: Tensor, targets: Tensor, w: Tensor | None) -> Tensor:
        """Return the losses of rows, shaped like the targets."""
        if isinstance(self.label_smoothing, Tensor):
            # It is linear in α: between the label's and the mean over classes.
            plain, uniform = (self._of_smoothing(logits, targets, w, alpha) for alpha in (0.0, 1.0))
            return torch.lerp(plain, uniform, self.label_smoothing)
        return self._of_smoothing(logits, targets, w, self.label_smoothing)

    def _of_smoothing(self, logits: Tensor, targets: Tensor, w: Tensor | None, alpha: float) -> Tensor:
        return F.cross_entropy(
            *(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), w),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=alpha,
        ).reshape(targets.shape)

    def linear(
        self,
        e: Tensor,
        c: Tensor | LowRankClassifier,
        targets: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """See :meth:`RowLoss.linear`; further options are those of :func:`lossworks.linear_cross_entropy`."""
        found = linear_cross_entropy(
            *(e, c, targets, bias),
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            class_weight=self._class_weights(e, len(c)),
            token_weight=options.pop("weight", None),
            z_loss=self.z_loss,
            **options,
        )
        return found if isinstance(found, Tensor) else found[0]

    def _class_weights(self, like: Tensor, classes: int) -> Tensor | None:
        if self.class_weight is None:
            return None
        if len(self.class_weight) != classes:
            raise UserError(
                f"{self.slug}: class_weight has {len(self.class_weight)} numbers for {classes} classes"
            )
        return torch.tensor(self.class_weight, dtype=wide(like[:0]).dtype, device=like.device)


class LogZ(CrossEntropy):
    """Cross-entropy with a penalty on the squared log of the partition function.

    It keeps the logits' common offset, which cross-entropy leaves free, near 0. Alone it is a term for a sum
    of losses, of the logsumexp only.
    """

    slug = "log-z"
    formula = "cross-entropy + ζ lse²; alone ζ lse²"
    paper = Paper(
        "Small-scale proxies for large-scale Transformer training instabilities",
        "Wortsman et al.",
        2023,
        "section 2; PaLM, Chowdhery et al. 2022, section 5",
    )
    invariances = ()
    cases = (Case({"coefficient": 0.0}, "cross-entropy"),)

    coefficient: float = number(
        1e-4, "ζ: weight of lse²; 0 is cross-entropy", ge=0, search=(1e-5, 1e-2), log=True
    )
    alone: bool = switch(
        False, "leave cross-entropy out, and with it what label_smoothing and class_weight do"
    )

    @property
    def per_row(self) -> tuple[str, ...]:
        """The names of the smoothing α and the coefficient ζ."""
        return (*super().per_row, "coefficient")

    @property
    def z_loss(self) -> float:  # type: ignore[override]
        """The weight of lse²."""
        return self.coefficient

    def phi(self, target: Tensor, logsumexp: Tensor, classes: int) -> Tensor:
        """See :meth:`RowLoss.phi`; without smoothing and class weights."""
        return (
            self.coefficient * logsumexp.square() if self.alone else super().phi(target, logsumexp, classes)
        )

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """See :meth:`RowLoss.forward`."""
        own = RowLoss.forward if self.alone else CrossEntropy.forward
        return own(self, logits, targets, **given)

    def linear(
        self,
        e: Tensor,
        c: Tensor | LowRankClassifier,
        targets: Tensor,
        bias: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """See :meth:`RowLoss.linear`."""
        own = RowLoss.linear if self.alone else CrossEntropy.linear
        return own(self, e, c, targets, bias, **options)
