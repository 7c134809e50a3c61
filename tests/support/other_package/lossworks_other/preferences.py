"""A loss of a kind that Lossworks doesn't have: of two scores, and which of the two was preferred."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.losses import Loss
from lossworks.losses.problems import Problem
from lossworks.losses.rows import wide


class BradleyTerry(Loss):
    """Bradley and Terry's model of which of two is preferred."""

    slug = "bradley-terry"
    kind: ClassVar[str] = "pair"
    formula = "softplus(-β (s_chosen - s_other))"
    paper = Paper("Rank Analysis of Incomplete Block Designs", "Bradley, Terry", 1952)
    invariances = ("shift",)
    example = "python -c 'from lossworks_other import preferences'"

    beta: float = number(1.0, "β: how much a difference of scores tells", gt=0, search=(0.1, 10), log=True)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        scores = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
        return Problem(scores, torch.randint(0, 2, (rows,), generator=generator))

    def forward(self, scores: Tensor, chosen: Tensor, **given: Tensor | None) -> Tensor:
        context = self.context(given)
        valid = self.valid_rows(self.counting(chosen, context))
        # Chosen first: where nothing counts, the scores may be anything.
        scores = torch.where(valid[..., None], wide(scores), 0)
        sign = torch.where(chosen == 0, 1.0, -1.0)
        lead = sign.to(scores) * (scores[..., 0] - scores[..., 1])
        return self.reduce_elements(F.softplus(-self.beta * lead), valid, context)
