"""The parts that specs of every room share: data, model, loss, companions, evaluation, checkpoints."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.adapters.pydantic_private import replace_extra
from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration, declarations
from lossworks.specs.base import OpenSpec, Spec


class ModelSpec(Spec):
    """A decoder-only transformer of our own, or a local transformers checkpoint."""

    source: str = Field(
        "transformer", description="transformer, or hf:PATH for a local causal language model"
    )
    layers: int = Field(4, ge=1, le=1024, description="transformer blocks")
    width: int = Field(256, ge=2, le=65536, description="features a token, D")
    heads: int = Field(4, ge=1, le=1024, description="attention heads; must divide width")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads; must divide heads; default heads")
    hidden: int | None = Field(
        None, ge=1, description="feed-forward features; default 8/3 width (SwiGLU) or 4 width (GELU)"
    )
    norm: Literal["rmsnorm", "layernorm", "none"] = Field(
        "rmsnorm", description="normalisation of the residual stream; none for a model without norms"
    )
    activation: Literal["swiglu", "gelu", "none"] = Field(
        "swiglu",
        description="feed-forward activation; none is one linear layer, width × width, added at a scale that "
        "is learnt to the residual stream at another",
    )
    attention_temperature: Literal["none", "exp", "softplus"] = Field(
        "none",
        description="attention's scores are divided by temperatures that are learnt, one for each head and "
        "position, and kept positive by this function",
    )
    temperature_init: float = Field(1.0, gt=0.0, description="attention temperatures at the start")
    temperature_positions: int = Field(
        256,
        ge=1,
        le=2**20,
        description="positions with a temperature of their own; later ones have the last's",
    )
    qk_norm: bool = Field(False, description="RMSNorm on queries and keys, per head")
    tied: bool = Field(True, description="the head shares the embedding matrix")
    rope_base: float = Field(10000.0, gt=1.0, description="base of the rotary frequencies")

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value == "transformer" or (value.startswith("hf:") and len(value) > 3):
            return value
        raise ValueError("must be transformer or hf:PATH")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source != "transformer":
            return self
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(
                f"width/heads={self.width // self.heads} must be even: rotary embeddings turn pairs"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.activation == "none" and self.hidden is not None:
            raise ValueError(
                f"hidden={self.hidden} has no effect with activation=none, whose layer is width × width"
            )
        return self


class ShardingSpec(Spec):
    """How a model is spread over the workers; ``sharding=fsdp`` is short for ``sharding.kind=fsdp``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["none", "ddp", "fsdp"] = Field(
        "ddp", description="none (one worker), ddp (replicas) or fsdp (parameters split over the workers)"
    )
    vocab_parallel: bool = Field(
        False,
        description="with fsdp: the head is never gathered; each worker keeps its classes and takes the "
        "features of all workers' tokens",
    )

    def __str__(self) -> str:
        return f"{self.kind}, vocabulary-parallel head" if self.vocab_parallel else self.kind


class WeightSpec(Spec):
    """The factor of a term in a sum of losses: constant, or going in a line from one number to another.

    ``weight=0.1`` is short for ``weight.value=0.1``.
    """

    shorthand: ClassVar[str | None] = "value"

    value: float = Field(
        1.0, description="factor of the term, negative to climb it; of a line, its factor at the start"
    )
    final: float | None = Field(None, description="factor at the end of the line; null for a constant")
    start: int = Field(1, ge=1, description="step, counted from 1, up to which the factor is `value`")
    steps: int = Field(1, ge=1, description="steps from `value` to `final`")

    def at(self, step: int) -> float:
        """Return the factor at a step, counted from 1."""
        if self.final is None:
            return self.value
        done = min(max(step - self.start, 0) / self.steps, 1.0)
        return self.value + done * (self.final - self.value)

    def __str__(self) -> str:
        if self.final is None:
            return f"{self.value:g}"
        return f"{self.value:g} to {self.final:g} in {self.steps} steps"


_FIELDS = {"losses": "loss"}  # of a run, by section, where they are called otherwise


class EntrySpec(OpenSpec):
    """An entry of the catalogue with its hyperparameters, which are fields beside ``name``.

    Attributes:
        section: Of the catalogue, in which the entry must be.
    """

    shorthand: ClassVar[str | None] = "name"
    open_to: ClassVar[str | None] = "name"
    section: ClassVar[str] = "losses"

    name: str = Field(description="slug of the entry in the catalogue")

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The entry's hyperparameters, defaults included."""
        return dict(self.model_extra or {})

    def further_fields(self) -> list[tuple[str, str, str]]:
        """See :meth:`Spec.further_fields`: the entry's hyperparameters."""
        entry = declaration(self.name, self.section)
        return [(own.name, own.meaning, own.allowed) for own in entry.hyperparameters]

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Check the hyperparameters and give the others their defaults, which are stored with a run."""
        section = getattr(declarations().get(self.name), "section", self.section)
        if section != self.section:
            field = _FIELDS.get(section, section)
            raise ValueError(
                f"{self.name}: is one of the {section}, not of the {self.section}; name it in "
                f"{field}: [{self.name}]"
            )
        entry = declaration(self.name, self.section)
        resolved = entry.check(self.model_extra or {}, beside=type(self).model_fields)
        replace_extra(self, resolved)
        return self


class MethodSpec(EntrySpec):
    """A method: what changes how training goes, or follows it; ``smooth-adversarial-comp-sum`` is short."""

    section: ClassVar[str] = "methods"


class AnalysisSpec(EntrySpec):
    """An analysis that is measured with each evaluation, such as ``neural-collapse``."""

    section: ClassVar[str] = "analyses"


class LossSpec(EntrySpec):
    """The training objective on the model's head: a loss of the catalogue with its hyperparameters.

    They are fields beside ``name``: ``{name: ldr, temperature: 0.7}``; ``loss=ldr`` is short for
    ``loss.name=ldr``. `lossworks losses NAME` says which there are. A list is a weighted sum of losses, the
    first of which is the field itself and the others are ``plus``.
    """

    list_tail: ClassVar[str | None] = "plus"

    name: str = Field("cross-entropy", description="slug of the loss; `lossworks losses` lists them")
    impl: Literal["auto", "cpu", "triton", "reference"] = Field(
        "auto",
        description="how the head is computed: cpu (plain torch) and triton (a GPU's kernels) never build "
        "the logits, auto chooses between them, reference builds the logits",
    )
    weight: WeightSpec = WeightSpec()
    plus: "tuple[LossSpec, ...]" = Field(
        (), description="further terms of a sum, each a loss with its weight and hyperparameters"
    )

    @property
    def terms(self) -> "tuple[LossSpec, ...]":
        """All losses of the sum, this one first."""
        return (self, *self.plus)

    @property
    def titles(self) -> tuple[str, ...]:
        """What each term is called in logs: its slug, with a number where that is there twice."""
        slugs = [term.name for term in self.terms]
        return tuple(
            slug if slugs.count(slug) == 1 else f"{slug}-{slugs[: place + 1].count(slug)}"
            for place, slug in enumerate(slugs)
        )

    def require(self, able: Callable[[Declaration], bool], what: str) -> None:
        """Refuse a loss that can't train something.

        Raises:
            ValueError: Naming those that can.
        """
        for term in self.terms:
            if not able(declaration(term.name)):
                others = ", ".join(slug for slug, entry in declarations().items() if able(entry))
                raise ValueError(f"loss.name={term.name} can't train {what}; what can: {others}")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for place, term in enumerate(self.terms if self.plus else ()):
            if "name" not in term.model_fields_set:
                raise ValueError(f"item {place} of the list has no name; write {{name: LOSS, weight: …}}")
        for term in self.terms:
            if self.impl == "triton" and "plain-torch" in declaration(term.name).flags:
                raise ValueError(
                    f"impl=triton: {term.name} has no Triton kernel; use auto, which runs it on GPUs, too"
                )
        for term in self.plus:
            if term.plus:
                raise ValueError(f"plus: {term.name} has further terms of its own; put all into one list")
            if term.impl not in ("auto", self.impl):
                raise ValueError(
                    f"plus: impl={term.impl} of {term.name} must be that of {self.name}, {self.impl}"
                )
        return self


class RoleSpec(Spec):
    """A companion of the model whose outputs a loss reads: frozen, or a slowly moving copy of the model.

    ``teacher=RUN`` is short for ``teacher.of=RUN``.
    """

    shorthand: ClassVar[str | None] = "of"

    of: str | None = Field(
        None,
        min_length=1,
        description="a run, a folder of `lossworks export`, hf:PATH of a local transformers model, or start: "
        "the model as training begins",
    )
    ema: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="a copy of the model that keeps this share of itself at every step and takes the rest "
        "from the model",
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.of is None) == (self.ema is None):
            raise ValueError("give one of `of` (a run, a folder or start) and `ema`")
        return self


class EvaluationSpec(Spec):
    """When and on how much held-out data the model is evaluated."""

    every: int = Field(50, ge=1, description="steps between evaluations; the last step is always evaluated")
    sequences: int = Field(64, ge=1, description="held-out sequences or examples an evaluation, all if fewer")


class ElasticSpec(Spec):
    """What happens while there is no room for all workers.

    ``elastic=1`` is short for ``elastic.min_workers=1``.
    """

    shorthand: ClassVar[str | None] = "min_workers"

    min_workers: int | None = Field(
        None,
        ge=1,
        description="go on with as few workers when nodes are lost, from the last checkpoint; unset: wait "
        "until all have room again",
    )
    resize_every_s: float = Field(
        60.0, ge=1.0, description="seconds between looks for room for more workers, up to `workers`"
    )

    def __str__(self) -> str:
        return "no" if self.min_workers is None else f"from {self.min_workers} workers"


class SpikeSpec(Spec):
    """When a loss stands out, and what is done about it; ``spike=8`` is short for ``spike.height=8``."""

    shorthand: ClassVar[str | None] = "height"

    height: float | None = Field(
        None,
        gt=0.0,
        description="a spike is a loss so many deviations above the median of the last 64; null for none",
    )
    action: Literal["warn", "skip", "rollback"] = Field(
        "warn",
        description="warn names the step and its examples; skip leaves the batch's update out and takes the "
        "next batch; rollback goes back to the newest checkpoint, or the start, and on behind the batch",
    )
    most: int = Field(
        5,
        ge=1,
        description="with skip and rollback: spikes in a row that are left out; one more ends the run as "
        "diverged",
    )

    @property
    def leaves_out(self) -> bool:
        """Whether the batch of a spike is left out of training."""
        return self.action != "warn"

    @model_validator(mode="after")
    def _has_height(self) -> Self:
        if self.height is None and self.leaves_out:
            raise ValueError(f"action={self.action} needs a height above which a loss is a spike: height=8")
        return self


class TelemetrySpec(Spec):
    """What is looked at inside the loss while it trains; nothing unless asked for."""

    shorthand: ClassVar[str | None] = "every"

    every: int = Field(
        0,
        ge=0,
        description="steps between looks at the distributions of single losses, of gradients at "
        "the logits and of the logits; 0 for none. A look costs a forward pass of a few examples",
    )
    rows: int = Field(256, ge=1, le=65536, description="rows of logits that each worker looks at")
    spike: SpikeSpec = SpikeSpec()

    @property
    def looks(self) -> bool:
        """Whether anything is looked at."""
        return bool(self.every) or self.spike.height is not None

    def __str__(self) -> str:
        return f"every {self.every} steps" if self.every else "none"


class ProfileSpec(Spec):
    """Which steps torch's profiler records on the first worker; none unless asked for."""

    shorthand: ClassVar[str | None] = "steps"

    steps: int = Field(0, ge=0, le=100, description="steps that are recorded; 0 for none")
    start: int = Field(5, ge=1, description="the first of them, after those that warm up")

    def __str__(self) -> str:
        return f"{self.steps} steps from {self.start}" if self.steps else "none"


class CheckpointSpec(Spec):
    """When checkpoints are written and how many stay."""

    every: int = Field(100, ge=1, description="steps between checkpoints; the last step is always saved")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay, besides the best by held-out loss")
    background: bool = Field(
        False,
        description="write checkpoints while training goes on, from a copy of weights and optimiser state "
        "that each worker keeps in memory from the first one on; training waits for the copying alone",
    )
    patience_s: float = Field(
        60.0, ge=0.0, description="seconds to try again while storage refuses, before the run ends"
    )
    mirror: str | None = Field(
        None,
        description="address of a folder in an object store, such as s3://BUCKET/PREFIX, to which whole "
        "checkpoints are copied; `lossworks train --resume ADDRESS/RUN` goes on from there elsewhere",
    )

    @field_validator("mirror")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, slashes, rest = value.partition("://")
        if not slashes or not rest.strip("/") or (scheme == "file" and not rest.startswith("/")):
            raise ValueError(
                "must be an address such as s3://bucket/prefix, gs://bucket/prefix or file:///folder"
            )
        if ":" in rest.rpartition("@")[0]:
            raise ValueError("must hold no password: the store's library reads them from the environment")
        if scheme == "memory":
            raise ValueError("must not be memory://, which is gone with the process")
        from fsspec import available_protocols

        if scheme not in available_protocols():
            raise ValueError(f"{scheme}:// is no kind of store that fsspec knows")
        return value
