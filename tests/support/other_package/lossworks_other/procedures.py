"""A method and an analysis of another package."""

import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number
from lossworks.tasks.analyses import Analysis
from lossworks.tasks.methods import Method


class InputNoise(Method):
    """Noise on inputs: trains on inputs with Gaussian noise."""

    slug = "input-noise"
    formula = "x + σ ε"
    paper = Paper("Training with Noise is Equivalent to Tikhonov Regularization", "Bishop", 1995)

    sigma: float = number(0.1, "σ: deviation of the noise, in the inputs' unit", ge=0, search=(0, 1))

    def disturbed(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return inputs + self.sigma * torch.randn(inputs.shape, generator=generator)


class Confidence(Analysis):
    """Confidence: how sure a classifier is on average."""

    slug = "confidence"
    formula = "mean max_k p_k"
    paper = Paper("On Calibration of Modern Neural Networks", "Guo, Pleiss, Sun, Weinberger", 2017)

    def figures(self, logits: Tensor) -> float:
        return float(logits.softmax(-1).max(-1).values.mean())
