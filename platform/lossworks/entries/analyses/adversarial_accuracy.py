"""How often a classifier is right where inputs are moved against it."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.entries.methods.adversarial import projected_ascent
from lossworks.errors import UserError
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums


class AdversarialAccuracy(Analysis):
    """Adversarial accuracy: how often a classifier is right at the worst inputs that an attack finds.

    The attack is projected gradient ascent on cross-entropy within a ball around each held-out example. What
    it finds is no more than what there is: a stronger attack may find worse inputs.
    """

    slug = "adversarial-accuracy"
    formula = "mean [argmax f(x') = y], x' by steps along the sign of the gradient within |x' - x| ≤ γ"
    paper = Paper(
        "Towards Deep Learning Models Resistant to Adversarial Attacks",
        "Madry, Makelov, Schmidt, Tsipras, Vladu",
        2018,
        "section 2.1",
    )
    example = "lossworks train jobs/specs/digits.yaml analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/adversarial_accuracy": "max"}

    radius: float = number(0.1, "γ: ℓ∞ radius of the attack, in units of the inputs", ge=0)
    steps: int = integer(10, "steps of the attack, of a quarter of γ each", ge=1, le=1000)
    seed: int = integer(0, "of the attack's start", ge=0)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but classifiers, whole or as replicas.

        Raises:
            UserError: Naming the field.
        """
        task.require_classifier(f"analyses: {self.slug} attacks")
        if spec.sharding.kind == "fsdp":
            raise UserError(
                f"analyses: {self.slug} runs the model several times: set sharding to ddp or none"
            )

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        generator = torch.Generator().manual_seed(self.seed)

        def right(outputs: Outputs, batch: Batch) -> Tensor:
            if outputs.rerun is None:
                raise ValueError("outputs must be able to run the model again")
            rerun, targets = outputs.rerun, batch["targets"]
            valid = targets != IGNORE_INDEX
            labels = torch.where(valid, targets, 0)
            attacked = projected_ascent(
                lambda x: F.cross_entropy(rerun(x).logits, labels, reduction="none"),
                batch["inputs"],
                self.radius,
                steps=self.steps,
                step_size=self.radius / 4,
                generator=generator,
            )
            answers = rerun(attacked).logits.argmax(1)
            return as_sums(((answers == labels) & valid).sum(), valid.sum(), like=outputs.hidden)

        found, count = probe.over(right, probe.task.held_out, probe.held_out).tolist()
        return Finding({"adversarial_accuracy": found / max(count, 1.0)})
