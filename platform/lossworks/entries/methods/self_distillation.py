"""Self-distillation: a segmenter is trained on what the one before it says, instead of the masks."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.catalogue.registry import declaration
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.losses.rows import wide
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method


class SelfDistillation(Method):
    """Self-distillation: one round, in which the teacher's probabilities take the place of the masks.

    A round is a run: it starts from fresh weights, has a schedule and an optimiser of its own, and its
    teacher is the run of the round before, which reads the very images that the model reads, as they are
    augmented. The first round is a run without it; the paper takes three. Held-out data are measured by their
    own masks, and a pixel that a mask ignores is not trained on. The released code takes the first round's
    labels in every later one, and goes on with the first one's schedule at its end; here neither can happen.

    Use it where masks are noisy or few and training is long. A second round of 120 steps on drawn walls was
    not told apart from the first.
    """

    slug = "self-distillation"
    roles = ("teacher",)
    example = "lossworks train jobs/specs/walls.yaml methods=[{slug}] roles.teacher=RUN"
    formula = "the losses of maps at y = softmax(z/τ) of the teacher"
    paper = Paper(
        "TopoMortar: A Dataset to Evaluate Image Segmentation Methods Focused on Topology Accuracy",
        "Valverde, Koga, Otsuka, Dahl",
        2025,
        "self-distillation",
    )

    temperature: float = number(
        1.0, "τ of the teacher's softmax; towards 0 its labels become sure", gt=0, search=(0.5, 2), log=True
    )

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse losses that take no probabilities in place of a mask.

        Raises:
            UserError: Naming the loss.
        """
        del task
        for term in spec.loss.terms:
            if (kind := declaration(term.name).kind) != "map":
                raise UserError(
                    f"methods: {self.slug} trains with losses of maps, such as ce-dice, which take soft "
                    f"targets; loss.name={term.name} is a {kind} loss"
                )

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """Return the sums of the objective at the teacher's probabilities; see :meth:`Method.loss`."""
        with torch.no_grad():
            logits = wide(outputs.roles["teacher"].logits) / self.temperature
            soft = logits.softmax(-1).movedim(-1, 1)
        found: Tensor = objective(outputs, {**batch, "soft_targets": soft})
        return found
