"""Companions of a model in training: a teacher, a reference, a slowly moving copy."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from lossworks.catalogue.registry import declaration
from lossworks.data.batch import Batch, on
from lossworks.models import HeadedModel, Outputs
from lossworks.models.interface import Head
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Task
from lossworks.training.distributed.sharding import distribute, move
from lossworks.training.distributed.world import World
from lossworks.training.weights.start import companion_of


class Roles:
    """The companions of a run: frozen, in evaluation mode, spread over ranks as the model is.

    Args:
        spec: The run.
        task: Its task.
        model: As training begins, before it is distributed.
        world: The ranks.
        mesh: As :func:`lossworks.training.distributed.sharding.mesh_of` gives it.
        find: Gives a companion that is not a copy of the model, for its name, its field and the task.

    Attributes:
        seconds: What their forward passes have taken on this rank.
    """

    def __init__(
        self,
        spec: RunSpec,
        task: Task,
        model: HeadedModel,
        world: World,
        mesh: DeviceMesh | None = None,
        find: Callable[[str, str, Task], HeadedModel] = companion_of,
    ) -> None:
        self._world, self._specs, self._task = world, spec.roles, task
        entries = (*spec.loss.terms, *spec.methods, *spec.analyses)
        self._read = any(declaration(entry.name).roles for entry in entries)
        self._sharded = spec.sharding.kind == "fsdp"
        self._models: dict[str, nn.Module] = {}
        self.seconds = 0.0
        for name, role in spec.roles.items():
            other = role.of is not None and role.of != "start"
            found = find(str(role.of), f"roles.{name}.of", task) if other else copy.deepcopy(model)
            found.requires_grad_(False).eval()
            move(found, world.device)
            # Replicas without gradients have nothing to exchange.
            self._models[name] = distribute(found, spec, world, mesh) if self._sharded else found

    def __bool__(self) -> bool:
        return bool(self._models)

    @property
    def bytes(self) -> float:
        """What the companions' parameters take on this rank."""
        return float(
            sum(p.numel() * p.element_size() for model in self._models.values() for p in _local(model))
        )

    @torch.no_grad()
    def outputs(self, batch: Batch, inputs: str = "inputs") -> dict[str, Outputs]:
        """Return the outputs of every companion for a batch, without gradients.

        Args:
            batch: A micro-batch.
            inputs: The name of what they read.
        """
        began = time.perf_counter()
        found: dict[str, Outputs] = {}
        own = on(self._world.device, {"inputs": batch[inputs]})
        for name, model in self._models.items():

            def keep(outputs: Outputs, _: Mapping[str, Tensor], name: str = name) -> Tensor:
                head = cast("Head", outputs.head)
                found[name] = Outputs(outputs.hidden, _copied(head) if self._sharded else head)
                return outputs.hidden.new_zeros(1)

            model(own, keep)
            if isinstance(model, FSDPModule):
                model.reshard()  # a forward pass without a backward pass leaves the root's parameters whole
        self.seconds += time.perf_counter() - began
        return found

    def beside(self, batch: Batch) -> tuple[Batch, dict[str, Outputs]]:
        """Return a batch with what its task reads of companions, and the outputs that losses read themselves.

        Args:
            batch: A micro-batch.
        """
        if not self:
            return batch, {}
        return self._task.completed(batch, self.outputs), self.outputs(batch) if self._read else {}

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move the slowly moving copies towards the distributed model, after an update."""
        for name, role in self._specs.items():
            if role.ema is None:
                continue
            theirs = dict(_bare(model).named_parameters())
            for parameter, own in _bare(self._models[name]).named_parameters():
                own.lerp_(theirs[parameter], 1 - role.ema)

    def moving(self) -> dict[str, nn.Module]:
        """Return the companions whose parameters change, which a checkpoint has to keep."""
        return {name: self._models[name] for name, role in self._specs.items() if role.ema is not None}


def _copied(head: Head) -> Head:
    """Return a head that stays whole after the forward, in which alone a sharded one is."""
    return Head(head.weight.clone(), None if head.bias is None else head.bias.clone(), head.softcap)


def _bare(model: nn.Module) -> nn.Module:
    """Return a model without the wrapper of its replicas."""
    return cast("nn.Module", getattr(model, "module", model))


def _local(model: nn.Module) -> list[Tensor]:
    return [cast("Tensor", getattr(p, "_local_tensor", p)) for p in model.parameters()]
