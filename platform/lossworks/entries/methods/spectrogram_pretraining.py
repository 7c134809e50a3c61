"""Pretraining of a mask's network as an autoencoder of the voice's spectrogram."""

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method


class SpectrogramPretraining(Method):
    """Spectrogram pretraining: the first steps learn the voice's spectrogram, all others the mask.

    The targets of those steps are the voice's magnitudes, scaled to [0, 1] in each patch (``voice``); the
    original leaves them unbounded, and its cross-entropy there has no minimum. The paper takes 300 of 600
    epochs for it, its code 180 of 300.
    """

    slug = "spectrogram-pretraining"
    formula = "t = |V| / max |V| of the patch in the first steps"
    paper = Paper(
        "Singing Voice Separation Using a Deep Convolutional Neural Network Trained by Ideal Binary Mask and "
        "Cross Entropy",
        "Lin, Balamurali, Koh, Lui, Herremans",
        2018,
        "autoencoder",
    )
    example = "lossworks train jobs/specs/voices.yaml methods=[{slug}]"

    steps: int = integer(100, "optimiser steps before the mask is trained", ge=1)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Method.check`."""
        super().check(task, spec)
        if "voice" not in task.provides:
            raise UserError(f"methods: {self.slug} reads the voice of songs, not task={task.slug}")

    def batch(self, batch: Batch, step: int) -> Batch:
        """See :meth:`Method.batch`."""
        return {**batch, "targets": batch["voice"]} if step <= self.steps else batch
