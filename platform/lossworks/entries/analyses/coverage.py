"""How often one of several drawn answers is right."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums


class Coverage(Analysis):
    """Coverage, or pass@N: the chance that N answers drawn from a model hold the right one.

    Of a language model an answer is all of its tokens; the chance is exact, and nothing is drawn. It rises
    with N the slower the surer the model is of wrong answers: training for accuracy, N = 1, can make it
    smaller at a large N.
    """

    slug = "coverage"
    formula = "mean over examples of 1 - (1 - p_y)^N"
    paper = Paper(
        "Rethinking Fine-Tuning when Scaling Test-Time Compute",
        "Chen, Raventós, Cheng, Ganguli, Druckmann",
        2025,
        "section 3",
    )
    example = "lossworks train jobs/specs/digits.yaml analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/coverage": "max", "eval/pass_at_1": "max"}

    samples: int = integer(16, "N: answers that are drawn", ge=1, le=10**6)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse what gives no answers.

        Raises:
            UserError: Naming the task.
        """
        if not task.answers(spec):
            raise UserError(
                f"analyses: {self.slug} draws answers: of classifiers, or of a language model on prompts "
                f"with answers (data.corpus=pairs:PATH), not of task={task.slug} as it is here"
            )

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""

        def covered(outputs: Outputs, batch: Batch) -> Tensor:
            targets = batch["targets"]
            valid = targets != IGNORE_INDEX
            if targets.dim() > 1:
                valid = valid.any(-1)
                p = answer_log_probabilities(outputs, targets)[valid].double().exp()
            else:
                log_p = outputs.logits[valid].double().log_softmax(1)
                p = log_p.gather(1, targets[valid, None]).exp()
            # Of p near 0, (1 − p)^N by its logarithm keeps its digits.
            hit = -torch.expm1(self.samples * torch.log1p(-p))
            return as_sums(hit.sum(), p.sum(), valid.sum(), like=outputs.hidden)

        hit, once, count = probe.over(covered, probe.task.held_out, probe.held_out).tolist()
        return Finding({"coverage": hit / max(count, 1.0), "pass_at_1": once / max(count, 1.0)})
