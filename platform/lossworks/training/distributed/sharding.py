"""How a model is spread over processes: not at all, as replicas, or split."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from lossworks.errors import UserError
from lossworks.models import HeadedModel
from lossworks.specs import RunSpec
from lossworks.training.distributed.split_head import split_head
from lossworks.training.distributed.world import World


def distribute(model: HeadedModel, spec: RunSpec, world: World, mesh: DeviceMesh | None = None) -> nn.Module:
    """Return the model spread over the world as ``spec.sharding`` says, on this process's device.

    ``ddp`` keeps a replica in every process and averages gradients; for ``fsdp`` see :func:`prepare_model`. A
    world of one needs no DDP; FSDP is applied all the same, so that it can be tried anywhere.

    Args:
        model: Anywhere.
        spec: The run.
        world: The ranks.
        mesh: As :func:`mesh_of` gives it, if it was asked before.

    Raises:
        UserError: ``vocab_parallel`` and a head that can't be split; ``fsdp`` and a parameter without axes.
    """
    move(model, world.device)
    prepare_model(model, spec, mesh or mesh_of(spec, world))
    if spec.sharding.kind != "fsdp" and world.size > 1:
        return DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    return model


def move(model: HeadedModel, device: torch.device) -> None:
    """Move a model to a device; one that is there is not touched."""
    if any(parameter.device != device for parameter in model.parameters()):
        model.to(device)


def mesh_of(spec: RunSpec, world: World) -> DeviceMesh | None:
    """Return the ranks over which FSDP splits a model, or None without FSDP; every rank calls this."""
    if spec.sharding.kind != "fsdp":
        return None
    return init_device_mesh(world.device.type, (world.size,))


def prepare_model(model: HeadedModel, spec: RunSpec, mesh: DeviceMesh | None) -> None:
    """Have a model recompute activations, compile its blocks, and keep a part of itself, as ``spec`` says.

    FSDP is FSDP2 (``fully_shard``): every block is a unit of its own, and what is left (embedding, final
    norm, head) belongs to the root; with ``vocab_parallel`` the head belongs to none and stays split.

    Args:
        model: On the device of its process; changed in place.
        spec: The run.
        mesh: As :func:`mesh_of` gives it.

    Raises:
        UserError: ``vocab_parallel`` and a head that can't be split; ``fsdp`` and a parameter without axes.
    """
    if spec.activation_checkpointing:
        model.checkpoint_activations()
    if spec.compile:
        for block in model.blocks():
            block.compile()
    if mesh is not None:
        _require_axes(model)
        split = split_head(model, mesh) if spec.sharding.vocab_parallel else set()
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params=split)


def _require_axes(model: nn.Module) -> None:
    """Refuse parameters that FSDP can't split, such as a temperature that a loss learns."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise UserError(
                f"sharding=fsdp: {name} is a single number, which can't be split; give it the shape (1,), or "
                "use sharding=ddp"
            )


@contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Exchange gradients in the backward passes inside, or leave them to a later micro-batch."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
        return
    quiet = isinstance(model, DistributedDataParallel) and not enabled
    with model.no_sync() if quiet else nullcontext():  # type: ignore[operator]
        yield


def clip_gradients(model: nn.Module, limit: float | None) -> float:
    """Scale the gradients so that their global norm is at most ``limit``; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if limit is None else limit)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
