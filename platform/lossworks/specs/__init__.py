"""Specs: what a run is, checked before anything starts."""

from lossworks.specs.base import Spec, field_paths, read_yaml
from lossworks.specs.parts import (
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LossSpec,
    ModelSpec,
    OptimizerSpec,
    ScheduleSpec,
    ShardingSpec,
    TrackingSpec,
)
from lossworks.specs.train import TrainSpec

__all__ = [
    "CheckpointSpec",
    "DataSpec",
    "EvaluationSpec",
    "LossSpec",
    "ModelSpec",
    "OptimizerSpec",
    "ScheduleSpec",
    "ShardingSpec",
    "Spec",
    "TrackingSpec",
    "TrainSpec",
    "field_paths",
    "read_yaml",
]
