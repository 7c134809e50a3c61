"""AdamW with decoupled weight decay on matrices only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lossworks.specs import OptimizerSpec

OBJECTIVE = "objective"
"""Under this name losses are attached to the model that they train."""


def build_optimizer(model: nn.Module, spec: OptimizerSpec) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) over the parameters that want a gradient.

    Parameters with two or more axes (matrices, embeddings) decay; gains and biases do not, since pulling a
    normalisation's gain to zero is no regularisation. Nor do those of losses, which are a group of their own.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    own = [p for name, p in named if OBJECTIVE in name.split(".")]
    wanted = [p for name, p in named if OBJECTIVE not in name.split(".")]
    groups = [
        {"params": [p for p in wanted if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in wanted if p.dim() < 2], "weight_decay": 0.0},
        {"params": own, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.lr,
        betas=spec.betas,
        eps=spec.eps,
        fused=True,
    )


@contextmanager
def as_set(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep the settings of an optimiser while its state is restored: the spec of today has them."""
    names = ("lr", "betas", "eps", "weight_decay")
    before = [{name: group[name] for name in names} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update(settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient holds NaN or infinity in this process."""
    bad = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        local = getattr(gradient, "_local_tensor", gradient)  # FSDP: this rank's shard
        if local is not None and not bool(local.isfinite().all()):
            bad.append(name.removeprefix("module."))
    return bad
