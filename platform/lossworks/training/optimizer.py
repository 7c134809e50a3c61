"""The optimisers that a spec names, over the parameters of a model, whole or split over ranks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.models import HeadedModel
from lossworks.specs import OptimizerSpec
from lossworks.training.distributed.whole_tensors import WholeAdafactor, WholeMuon

OBJECTIVE = "objective"
"""Under this name losses are attached to the model that they train."""

Optimizers = tuple[torch.optim.Optimizer, ...]
"""What moves the parameters of one model, each parameter by one of them."""


def build_optimizers(model: nn.Module, spec: OptimizerSpec) -> Optimizers:
    """Return the optimisers of a kind over the parameters that want a gradient.

    Parameters with two or more axes (matrices, embeddings) decay; gains and biases do not, since pulling a
    normalisation's gain to zero is no regularisation. Nor do those of losses, which are a group of their own.

    ``adamw`` (Loshchilov and Hutter 2019), ``sgd`` and ``adafactor`` (Shazeer and Stern 2018) are one
    optimiser. ``muon`` is two: Muon moves the matrices of the body, see :func:`body_matrices`, and AdamW
    everything else. Where parameters are split over ranks, Muon and Adafactor look at whole ones.

    Args:
        model: On its device, and distributed already.
        spec: Kind and hyperparameters.

    Raises:
        UserError: ``kind=muon``, and the model has no matrices in its body.
    """
    own = spec.hyperparameters
    if spec.kind == "sgd":
        return (torch.optim.SGD(_groups(model, spec), lr=spec.lr, **own),)
    if spec.kind == "adafactor":
        return (WholeAdafactor(_groups(model, spec), lr=spec.lr, **own),)
    if spec.kind == "muon":
        return _muon_and_adamw(model, spec)
    return (torch.optim.AdamW(_groups(model, spec), lr=spec.lr, **own, fused=True),)


def body_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters with two axes that are in no embedding, no head and no loss.

    Matrices that an embedding shares with the head are not among them, nor are kernels of convolutions.
    """
    apart = {id(parameter) for parameter in _outside_of_body(model)}
    return [p for name, p in _wanted(model) if p.dim() == 2 and id(p) not in apart and not _of_loss(name)]


def _muon_and_adamw(model: nn.Module, spec: OptimizerSpec) -> Optimizers:
    matrices, own = body_matrices(model), spec.hyperparameters
    if not matrices:
        raise UserError(
            "optimizer.kind=muon: the model has no matrices between its inputs and its head, which are what "
            "Muon moves; use optimizer.kind=adamw, or more layers"
        )
    betas, eps, lr = own.pop("betas"), own.pop("eps"), own.pop("adamw_lr")
    adamw = torch.optim.AdamW(
        _groups(model, spec, without=matrices), lr=lr or spec.lr, betas=betas, eps=eps, fused=True
    )
    return WholeMuon(matrices, lr=spec.lr, weight_decay=spec.weight_decay, **own), adamw


def _groups(model: nn.Module, spec: OptimizerSpec, *, without: Sequence[Tensor] = ()) -> list[dict[str, Any]]:
    """Return the parameters of an optimiser: those that decay, those that don't, those of losses."""
    apart = {id(parameter) for parameter in without}
    named = [(name, p) for name, p in _wanted(model) if id(p) not in apart]
    losses = [p for name, p in named if _of_loss(name)]
    others = [p for name, p in named if not _of_loss(name)]
    groups = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        {"params": losses, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _wanted(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _of_loss(name: str) -> bool:
    return OBJECTIVE in name.split(".")


def _outside_of_body(model: nn.Module) -> Iterator[Tensor]:
    """Yield the weights of embeddings and heads."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield module.weight
        elif isinstance(module, HeadedModel):
            yield module.head().weight


@contextmanager
def as_set(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Keep the settings of optimisers while their state is restored: the spec of today has them."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    yield
    after = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, settings in zip(after, before, strict=True):
        group.update(settings)


def set_lr(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set the learning rate of every group to a factor of its optimiser's peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradient holds NaN or infinity in this process."""
    bad = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        local = getattr(gradient, "_local_tensor", gradient)  # FSDP: this rank's shard
        if local is not None and not bool(local.isfinite().all()):
            bad.append(name.removeprefix("module."))
    return bad
