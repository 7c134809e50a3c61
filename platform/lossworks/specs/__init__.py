"""Specs: what a run is, checked before anything starts."""

from lossworks.specs.base import Spec, field_paths, read_yaml
from lossworks.specs.classification import (
    AnyTrainSpec,
    ClassifierModelSpec,
    ClassifierSpec,
    ExamplesSpec,
    parse_train_spec,
    read_train_spec,
)
from lossworks.specs.parts import (
    CheckpointSpec,
    DataSpec,
    EvaluationSpec,
    LossSpec,
    ModelSpec,
    OptimizerSpec,
    ProfileSpec,
    ScheduleSpec,
    ShardingSpec,
    TelemetrySpec,
)
from lossworks.specs.tracking import ModelTrackingSpec, TrackingSpec
from lossworks.specs.train import RunSpec, TrainSpec

__all__ = [
    "AnyTrainSpec",
    "CheckpointSpec",
    "ClassifierModelSpec",
    "ClassifierSpec",
    "DataSpec",
    "EvaluationSpec",
    "ExamplesSpec",
    "LossSpec",
    "ModelSpec",
    "ModelTrackingSpec",
    "OptimizerSpec",
    "ProfileSpec",
    "RunSpec",
    "ScheduleSpec",
    "ShardingSpec",
    "Spec",
    "TelemetrySpec",
    "TrackingSpec",
    "TrainSpec",
    "field_paths",
    "parse_train_spec",
    "read_train_spec",
    "read_yaml",
]
