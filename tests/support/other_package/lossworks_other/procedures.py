"""A method and an analysis of another package."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.data.batch import Batch
from lossworks.models import Outputs
from lossworks.tasks.analyses import Analysis, Finding, Probe
from lossworks.tasks.interface import Mode, as_sums
from lossworks.tasks.methods import Method


class InputNoise(Method):
    """Noise on inputs: trains on inputs with Gaussian noise."""

    slug = "input-noise"
    formula = "x + σ ε"
    paper = Paper("Training with Noise is Equivalent to Tikhonov Regularization", "Bishop", 1995)

    sigma: float = number(0.1, "σ: deviation of the noise, in the inputs' unit", ge=0, search=(0, 1))

    def batch(self, batch: Batch, step: int) -> Batch:
        inputs = batch["inputs"]
        noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(step))
        return {**batch, "inputs": inputs + self.sigma * noise.to(inputs)}


class Confidence(Analysis):
    """Confidence: how sure a classifier is on average."""

    slug = "confidence"
    formula = "mean max_k p_k"
    paper = Paper("On Calibration of Modern Neural Networks", "Guo, Pleiss, Sun, Weinberger", 2017)
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/confidence": "max"}

    def measure(self, probe: Probe) -> Finding:
        def sums(outputs: Outputs, batch: Batch) -> Tensor:
            valid = outputs.logits[batch["targets"] >= 0]
            return as_sums(valid.softmax(-1).amax(-1).sum(), float(len(valid)), like=valid)

        total, count = probe.over(sums, probe.task.held_out, probe.held_out).tolist()
        return Finding({"confidence": total / count})
