"""Specs: what a run is, checked before anything starts."""

from lossworks.specs.base import Spec, field_paths, read_yaml
from lossworks.specs.optimisation import OptimizerSpec, ScheduleSpec
from lossworks.specs.parts import (
    AnalysisSpec,
    CheckpointSpec,
    EvaluationSpec,
    LossSpec,
    MethodSpec,
    ModelSpec,
    ProfileSpec,
    RoleSpec,
    ShardingSpec,
    SpikeSpec,
    TelemetrySpec,
    WeightSpec,
)
from lossworks.specs.tasks.classification import ClassifierModelSpec, ExamplesSpec
from lossworks.specs.tasks.segmentation import AugmentationSpec, MasksSpec
from lossworks.specs.tasks.segmenter import SegmenterSpec
from lossworks.specs.tasks.text import DataSpec, PreferenceDataSpec, TokensSpec, UnlearningDataSpec
from lossworks.specs.tracking import ModelTrackingSpec, TrackingSpec
from lossworks.specs.train import RunSpec

__all__ = [
    "AnalysisSpec",
    "AugmentationSpec",
    "CheckpointSpec",
    "ClassifierModelSpec",
    "DataSpec",
    "EvaluationSpec",
    "ExamplesSpec",
    "LossSpec",
    "MasksSpec",
    "MethodSpec",
    "ModelSpec",
    "ModelTrackingSpec",
    "OptimizerSpec",
    "PreferenceDataSpec",
    "ProfileSpec",
    "RoleSpec",
    "RunSpec",
    "ScheduleSpec",
    "SegmenterSpec",
    "ShardingSpec",
    "Spec",
    "SpikeSpec",
    "TelemetrySpec",
    "TokensSpec",
    "TrackingSpec",
    "UnlearningDataSpec",
    "WeightSpec",
    "field_paths",
    "read_yaml",
]
