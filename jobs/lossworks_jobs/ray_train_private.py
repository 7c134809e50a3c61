"""Ray Train besides its documented interface: what a node that ends with its driver can do without."""

from typing import Any

from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


def start_coordinator() -> None:
    """Have Ray start the actor that Train's controller asks for room first of all, and else waits for."""
    get_or_create_autoscaling_coordinator()


class TrainerOnOwnNode(TorchTrainer):
    """A trainer without the actor that frees the CPUs of a controller that was killed.

    On a node that ends with its driver nothing is left to be freed.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        return [callback for callback in made if not isinstance(callback, PlacementGroupCleanerCallback)]
