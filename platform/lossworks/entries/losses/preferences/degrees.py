"""A head that tells how much of an answer's key content is there, trained beside a preference loss.

Shapes: B prompts, C candidates, L tokens, D features, K degrees.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem
from lossworks.losses.rows import wide
from lossworks.models import HeadedModel, Outputs


class PreferenceDegree(Loss):
    """SPO's degree loss: from the features at an answer's end, tell how many key phrases were deleted.

    The batch holds copies of the chosen answer with more and more of its key phrases deleted (by RAKE); the
    j-th of K lacks ⌈m·j/K⌉ of m. An answer with fewer than K phrases has no copies. The head is linear,
    begins at 0 and is left out of exports; its gradient reaches the model, and only this loss reads the
    copies: ``loss: [dpo, {name: spo-degree, weight: 0.1}]`` is the paper's sum with γ = 0.1.

    Use it beside any preference loss where answers carry facts, and a model should know a full one from a
    thin one. Not where answers are a few words: they have too few phrases; and mind that length alone tells
    much of the degree, which ``analyses: [degree-accuracy]`` shows: in our study (degrees) three in four,
    where the head told 0.55 at γ = 0.1 and 0.72 at γ = 1.
    """

    slug = "spo-degree"
    kind: ClassVar[str] = "preference"
    formula = "cross-entropy of the degree j by g = W h + b, h the features at the answer's last token"
    paper = Paper(
        "Self-supervised Preference Optimization",
        "Li et al.",
        2024,
        "section 3",
    )
    requires = ("degrees",)
    without_logits = True
    invariances = ("shift",)
    example: ClassVar[str] = (
        'lossworks train jobs/specs/preferences.yaml start=RUN loss="[dpo, {name: {slug}, weight: 0.1}]"'
    )

    degrees: int = integer(
        3, "K: versions of an answer, the whole one among them", ge=2, le=16, search=(2, 5)
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.head: nn.Linear | None = None

    def fit_to(self, model: HeadedModel) -> None:
        """See :meth:`Loss.fit_to`: W is 0 at first, so that the loss begins at log K."""
        weight = model.head().weight
        self.head = nn.Linear(weight.shape[1], self.degrees, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def own_logits(self, outputs: Outputs, valid: Tensor) -> Tensor:
        """Return g of every candidate, (B, C, K); see :meth:`Loss.own_logits`.

        Args:
            outputs: Features (B, C, L, D).
            valid: Which tokens count, bool (B, C, L).

        Raises:
            UserError: There is no head yet.
        """
        if self.head is None:
            raise UserError(f"{self.slug}: has no head; call fit_to(model) first")
        places = torch.arange(valid.shape[-1], device=valid.device)
        last = torch.where(valid, places, 0).amax(-1)
        index = last[..., None, None].expand(*last.shape, 1, outputs.hidden.shape[-1])
        features = wide(outputs.hidden.gather(-2, index)[..., 0, :])
        # Where nothing counts, the features may be anything.
        found: Tensor = self.head(torch.where(valid.any(-1)[..., None], features, 0))
        return found

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`: logits of the head, and a degree each, of which one doesn't count."""
        shape = (rows, self.degrees + 1)
        own = torch.randn(*shape, self.degrees, dtype=torch.float64, generator=generator)
        labels = torch.arange(self.degrees + 1).expand(rows, -1) - 1
        labels = torch.where(labels < 0, self.ignore_index, labels).contiguous()
        return Problem(own, labels).given(degrees=labels)

    def elements(self, batch: Batch) -> float:
        """Return how many versions count."""
        return float(self.count(batch["degrees"]))

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; the head reads the features, and the model's logits are not built."""
        del how
        given = {"weight": batch["weight"]} if "weight" in batch else {}
        with torch.autocast(outputs.hidden.device.type, enabled=False):
            own = self.own_logits(outputs, batch["targets"] != IGNORE_INDEX)
            found: Tensor = self(own, batch["degrees"], **given)
        return found

    def forward(self, own: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of the head's logits.

        Args:
            own: g, (B, C, K), floating point; half precision is read in float32.
            targets: The degree of each candidate, int64 (B, C); ``ignore_index`` for others.
            given: ``weight``, (B, C), or none.

        Returns:
            A scalar, or (B, C) for ``reduction="none"``.

        Raises:
            UserError: The shapes don't fit.
        """
        if own.shape[:-1] != targets.shape:
            raise UserError(
                f"{self.slug}: logits {tuple(own.shape)} and degrees {tuple(targets.shape)} must be "
                "(B, C, K) and (B, C)"
            )
        context = self.context({**given, "degrees": targets})
        targets = self.counting(targets, context)
        valid = targets != self.ignore_index
        logits = torch.where(valid[..., None], wide(own), 0)
        index = torch.where(valid, targets, 0)
        nats = F.cross_entropy(logits.flatten(0, -2), index.flatten(), reduction="none").reshape(valid.shape)
        return self.reduce_elements(nats, valid, context)
