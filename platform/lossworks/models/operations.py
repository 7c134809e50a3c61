"""How many floating-point operations a model takes, counted while it runs."""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lossworks.models.interface import HeadedModel


@torch.no_grad()
def count_step_flops(model: HeadedModel, inputs: Tensor) -> float:
    """Return the operations of a training step on ``inputs``: three times those of the forward pass.

    Products, convolutions and attention count; the backward pass takes twice the forward's, one product for
    the inputs and one for the weights. Attention is run by its formula, since torch's counter does not know
    all the kernels for it.

    Args:
        model: Before it is distributed; its mode is the same afterwards.
        inputs: (B, …) as its ``hidden`` takes them, on its device.
    """
    training = model.training
    model.eval()  # dropout draws no random numbers
    counter = FlopCounterMode(display=False)
    try:
        with sdpa_kernel(SDPBackend.MATH), counter:
            model.logits(inputs)
    finally:
        model.train(training)
    return 3.0 * counter.get_total_flops()
