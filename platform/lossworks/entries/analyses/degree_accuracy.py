"""Whether a head knows whole answers from thinned ones, and whether it knows more than their length."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.catalogue.registry import declaration
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums

_MOST = 16  # degrees


class DegreeAccuracy(Analysis):
    """Degree accuracy: how often the degree of an answer is told right, beside what its length alone tells.

    The length's guess is the degree whose mean length, over the same answers, is the nearest: it knows them
    already, which the head does not. The fall is by how many nats a token whole answers are likelier than the
    thinnest ones.

    Use it beside ``spo-degree``; nothing else tells degrees.
    """

    slug = "degree-accuracy"
    formula = (
        "share of argmax g = j; share of the nearest mean length = j; log p of j = 0 less that of j = K-1"
    )
    paper = Paper(
        "Self-supervised Preference Optimization",
        "Li et al.",
        2024,
        "section 3",
    )
    example = (
        'lossworks train jobs/specs/preferences.yaml start=RUN loss="[dpo, spo-degree]" analyses=[{slug}]'
    )
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/degree_accuracy": "max",
        "eval/length_accuracy": "max",
        "eval/degree_fall": "max",
    }

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse runs without a loss that tells degrees.

        Raises:
            UserError: Saying so.
        """
        del task
        if not any("degrees" in declaration(term.name).requires for term in spec.loss.terms):
            raise UserError(
                f"analyses: {self.slug} looks at a head that tells degrees, which loss={spec.loss.name} has "
                "not; add spo-degree to the losses"
            )

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        losses = probe.task.objective.terms

        def lengths(outputs: Outputs, batch: Batch) -> Tensor:
            degrees, tokens = batch["degrees"], (batch["targets"] != IGNORE_INDEX).sum(-1)
            every = [degrees == degree for degree in range(_MOST)]
            counts = [(tokens * of).sum() for of in every] + [of.sum() for of in every]
            return as_sums(*counts, like=outputs.hidden)

        totals, counts = probe.over(lengths, probe.task.held_out, probe.held_out).chunk(2)
        if not bool(counts.sum()):
            raise UserError(f"analyses: {self.slug}: no held-out answer has enough key phrases to be thinned")
        means = torch.where(counts > 0, totals / counts.clamp(min=1), torch.inf)
        thinnest = int(counts.nonzero().amax())

        def told(outputs: Outputs, batch: Batch) -> Tensor:
            degrees, valid = batch["degrees"], batch["targets"] != IGNORE_INDEX
            there = degrees != IGNORE_INDEX
            own = next(x for x in (loss.own_logits(outputs, valid) for loss in losses) if x is not None)
            tokens = valid.sum(-1)
            by_length = (tokens[..., None] - means.to(tokens.device)).abs().argmin(-1)
            log_p = answer_log_probabilities(outputs, batch["targets"]) / tokens.clamp(min=1)
            whole, thin = (torch.where(degrees == j, log_p, 0).sum() for j in (0, thinnest))
            right = ((own.argmax(-1) == degrees) & there).sum(), ((by_length == degrees) & there).sum()
            return as_sums(*right, there.sum(), whole, thin, like=outputs.hidden)

        right, by_length, count, whole, thin = probe.over(told, probe.task.held_out, probe.held_out).tolist()
        fall = whole / float(counts[0]) - thin / float(counts[thinnest])
        return Finding(
            {"degree_accuracy": right / count, "length_accuracy": by_length / count, "degree_fall": fall}
        )
