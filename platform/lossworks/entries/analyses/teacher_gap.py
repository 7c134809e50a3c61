"""How near a classifier is to its teacher on held-out data."""

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.losses.rows import wide
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums


class TeacherGap(Analysis):
    """Teacher gap: how often a classifier says what its teacher says, and how far its logits are from it.

    On held-out rows: the share with the same likeliest class, the mean of KL(q‖p) from the teacher's
    probabilities q, and the root mean square over rows and classes of z − t. The last one is of the
    classifier's own head (``model_gap``) and of the head that learns from the teacher (``teacher_gap``),
    which a loss such as ``dual-head-distillation`` has of its own, and which is the same one elsewhere.
    """

    slug = "teacher-gap"
    formula = "share of argmax z = argmax t; mean KL(q‖p); √ mean (z − t)²"
    paper = Paper(
        "Does Knowledge Distillation Really Work?",
        "Stanton, Izmailov, Kirichenko, Alemi, Wilson",
        2021,
        "section 3.2",
    )
    roles = ("teacher",)
    example = "lossworks train jobs/specs/digits.yaml roles.teacher=RUN analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/teacher_agreement": "max",
        "eval/teacher_kl": "min",
        "eval/teacher_gap": "min",
        "eval/model_gap": "min",
    }

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Analysis.check`."""
        super().check(task, spec)
        task.require_classifier(f"analyses: {self.slug} compares")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        losses = probe.task.objective.terms

        def sums(outputs: Outputs, batch: Batch) -> Tensor:
            valid = batch["targets"] != IGNORE_INDEX
            z, t = (wide(x.logits)[valid] for x in (outputs, outputs.roles["teacher"]))
            own = (loss.own_logits(outputs, valid) for loss in losses)
            heads = [wide(x)[valid] for x in own if x is not None]
            log_p, log_q = z.log_softmax(-1), t.log_softmax(-1)
            return as_sums(
                float(len(z)),
                (z.argmax(-1) == t.argmax(-1)).sum(),
                (log_q.exp() * (log_q - log_p)).sum(),
                *((x - t).square().mean(-1).sum() for x in (z, heads[0] if heads else z)),
                like=z,
            )

        rows, alike, kl, model, own = probe.over(sums, probe.task.held_out, probe.held_out).tolist()
        return Finding(
            {
                "teacher_agreement": alike / rows,
                "teacher_kl": kl / rows,
                "teacher_gap": math.sqrt(own / rows),
                "model_gap": math.sqrt(model / rows),
            }
        )
