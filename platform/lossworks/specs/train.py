"""What the specs of all training runs have in common."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Seed, Spec, Storage
from lossworks.specs.optimisation import LoraSpec, OptimizerSpec, ScheduleSpec
from lossworks.specs.parts import (
    AnalysisSpec,
    CheckpointSpec,
    ElasticSpec,
    EntrySpec,
    EvaluationSpec,
    LossSpec,
    MethodSpec,
    ProfileSpec,
    RoleSpec,
    ShardingSpec,
    TelemetrySpec,
)
from lossworks.specs.tracking import ModelTrackingSpec


class RunSpec(Spec):
    """What every training run has; the same spec and seed give the same result."""

    command: ClassVar[str | None] = "train"

    kind: Literal["training"] = Field("training", description="what the spec describes")
    name: str = Field("train", min_length=1, max_length=100, description="name of the run in MLflow")
    seed: Seed = Field(0, description="seed of the parameters, the data order and all noise")
    steps: int = Field(200, ge=1, description="optimiser steps")
    batch_size: int = Field(32, ge=1, description="sequences or examples a step, over all workers")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="how many of them a worker takes at once; gradients accumulate over a step; auto tries "
        "sizes before the first step and keeps the fastest that there is memory for",
    )
    workers: int = Field(2, ge=1, le=65536, description="processes that train together")
    resources_per_worker: dict[str, float] = Field(
        {"CPU": 1}, description="what each worker gets from Ray, for instance {CPU: 4, GPU: 1}"
    )
    elastic: ElasticSpec = ElasticSpec()
    sharding: ShardingSpec = ShardingSpec()
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs the products under autocast")
    activation_checkpointing: bool = Field(False, description="recompute blocks in the backward pass")
    compile: bool = Field(False, description="compile the transformer blocks with torch.compile")
    max_failures: int = Field(3, ge=0, description="times that lost workers are replaced before giving up")
    storage: Storage = Field(
        None, description="absolute folder of runs, shared by all workers; default: runs/ in the home folder"
    )
    start: str | None = Field(
        None,
        min_length=1,
        description="trained weights to begin from: a run, a folder of `lossworks export`, or hf:PATH of a "
        "local transformers model; model and tokenizer are theirs unless model.* is set",
    )
    loss: LossSpec = LossSpec()
    roles: dict[str, RoleSpec] = Field(
        default_factory=dict,
        description="companions of the model by name, such as teacher, reference or target, for losses that "
        "read them: {teacher: RUN}, {reference: start}, {target: {ema: 0.99}}",
    )
    methods: tuple[MethodSpec, ...] = Field(
        (), description="what changes how training goes, or follows it; `lossworks methods` lists them"
    )
    analyses: tuple[AnalysisSpec, ...] = Field(
        (), description="what is measured with each evaluation; `lossworks analyses` lists them"
    )
    optimizer: OptimizerSpec = OptimizerSpec()
    lora: LoraSpec = LoraSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    profile: ProfileSpec = ProfileSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    tracking: ModelTrackingSpec = ModelTrackingSpec()

    @field_validator("methods", "analyses", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | dict) else value

    @field_validator("methods", "analyses")
    @classmethod
    def _once(cls, value: "tuple[EntrySpec, ...]") -> "tuple[EntrySpec, ...]":
        names = [entry.name for entry in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"names {twice} twice; once is enough")
        return value

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _a_size(cls, value: Any) -> Any:
        if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        raise ValueError("must be an integer of at least 1, auto, or null")

    @property
    def rows_at_once(self) -> int | None:
        """Rows that a worker takes at once; None where a run has to find that out, or takes all of a step."""
        return None if self.micro_batch_size == "auto" else self.micro_batch_size

    @property
    def least_workers(self) -> int:
        """Workers that there must be room for: all, or as many as elastic training goes on with."""
        return self.elastic.min_workers or self.workers

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.sharding.kind == "none" and self.workers != 1:
            raise ValueError(f"sharding=none is for workers=1, not {self.workers}: use ddp or fsdp")
        if self.batch_size < self.workers:
            raise ValueError(f"batch_size={self.batch_size} must be at least workers={self.workers}")
        least = self.elastic.min_workers
        if least is not None and least > self.workers:
            raise ValueError(f"elastic.min_workers={least} must not exceed workers={self.workers}")
        if self.roles and self.sharding.vocab_parallel:
            raise ValueError(
                f"roles ({', '.join(self.roles)}) can't be combined with sharding.vocab_parallel=true"
            )
        if self.lora.rank and self.optimizer.only:
            raise ValueError(
                f"lora.rank={self.lora.rank} can't be combined with optimizer.only: adapters are all that is "
                "trained, and lora.layers says where"
            )
        for name, amount in self.resources_per_worker.items():
            if amount < 0:
                raise ValueError(f"resources_per_worker.{name}={amount} must not be negative")
        if self.schedule.warmup_steps + self.schedule.decay_steps > self.steps:
            raise ValueError(
                f"schedule.warmup_steps + schedule.decay_steps = "
                f"{self.schedule.warmup_steps + self.schedule.decay_steps} must not exceed steps={self.steps}"
            )
        if self.profile.steps and self.profile.start > self.steps:
            raise ValueError(
                f"profile.start={self.profile.start} must not be after the last of steps={self.steps}"
            )
        return self
