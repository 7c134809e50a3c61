"""Optimisers whose step is a function of whole parameters, where FSDP has split them over ranks.

Muon orthogonalises matrices, and Adafactor takes means over their rows and columns. torch's own take whole
tensors: of split ones they refuse some shapes, and take means over a rank's part of others.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class WholeSteps(torch.optim.Optimizer):
    """An optimiser whose parameters are gathered, stepped whole on every rank, and cut again, one at a time.

    What it keeps of a parameter and has the parameter's shape is split like it. All else, such as means over
    rows, is whole on every rank. A step gathers the parameter, its gradient and what is kept in its shape,
    and every rank computes the same. Parameters that are not split are stepped as torch does.

    It goes before one of torch's optimisers: ``class WholeMuon(WholeSteps, torch.optim.Muon)``.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step all parameters that have a gradient; every rank calls this.

        Args:
            closure: Computes the loss again, as for torch's own.

        Returns:
            What ``closure`` returned, or None without one.
        """
        groups = self.param_groups
        if not any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
            return super().step(closure)
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_whole(group, parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_whole(self, group: Mapping[str, Any], parameter: DTensor) -> None:
        whole = nn.Parameter(_gathered(parameter))
        whole.grad = _gathered(parameter.grad)
        self.state[whole] = {name: _gathered(value) for name, value in self.state.pop(parameter, {}).items()}
        self.param_groups = [{**group, "params": [whole]}]
        super().step()
        kept = self.state.pop(whole)
        parameter.copy_(_cut(whole, parameter))
        self.state[parameter] = {
            name: _cut(value, parameter) if value.shape == parameter.shape else value
            for name, value in kept.items()
        }


class WholeMuon(WholeSteps, torch.optim.Muon):
    """``torch.optim.Muon`` over parameters that may be split over ranks."""


class WholeAdafactor(WholeSteps, torch.optim.Adafactor):
    """``torch.optim.Adafactor`` over parameters that may be split over ranks."""


def _gathered(tensor: Any) -> Any:
    """Return a tensor with what other ranks hold of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _cut(whole: Tensor, like: DTensor) -> DTensor:
    """Return a tensor that every rank has, split as another is."""
    return distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=None)
