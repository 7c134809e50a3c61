"""The parts of a training's spec that say how parameters follow gradients: optimiser and schedule."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lossworks.adapters.pydantic_private import replace_extra
from lossworks.errors import nearest
from lossworks.specs.base import OpenSpec, Spec
from lossworks.specs.fields import fields_in_words

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class AdamWFields(Spec):
    """What AdamW has of its own (Loshchilov and Hutter 2019)."""

    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0.0, description="added to the root of the second moment")


class SgdFields(Spec):
    """What stochastic gradient descent has of its own, as in ``torch.optim.SGD``."""

    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the sum of gradients; 0 for none")
    nesterov: bool = Field(False, description="Nesterov's momentum, which looks one step ahead")

    @model_validator(mode="after")
    def _has_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs momentum above 0")
        return self


class MuonFields(AdamWFields):
    """What Muon has of its own (Jordan 2024; Liu et al. 2025), and the AdamW beside it."""

    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="of the AdamW beside it")
    eps: float = Field(1e-8, gt=0.0, description="of the AdamW beside it")
    adamw_lr: float | None = Field(
        None, gt=0.0, le=10.0, description="peak learning rate of the AdamW beside it; null for that of Muon"
    )
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="decay of the mean of gradients")
    nesterov: bool = Field(True, description="Nesterov's momentum, which looks one step ahead")
    ns_steps: int = Field(5, ge=1, le=99, description="Newton-Schulz iterations that orthogonalise an update")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = Field(
        "match_rms_adamw",
        description="factor on the learning rate of a matrix with A rows and B columns: original is "
        "√max(1, A/B); match_rms_adamw is 0.2·√max(A, B), with which lr and weight_decay are those of AdamW",
    )


class AdafactorFields(Spec):
    """What Adafactor has of its own (Shazeer and Stern 2018), as in ``torch.optim.Adafactor``."""

    beta2_decay: float = Field(
        -0.8, le=0.0, ge=-10.0, description="exponent c of the second moments' decay, 1 − t^c at step t"
    )
    eps: tuple[Annotated[float, Field(ge=0.0)] | None, Annotated[float, Field(ge=0.0)]] = Field(
        (None, 1e-3),
        description="least root of a second moment, null for the rounding of the parameters' type; least "
        "root mean square of a parameter that scales its step",
    )
    d: float = Field(1.0, ge=1.0, description="largest root mean square of an update before it is scaled")


_FIELDS: dict[str, type[Spec]] = {
    "adamw": AdamWFields,
    "sgd": SgdFields,
    "muon": MuonFields,
    "adafactor": AdafactorFields,
}
"""The fields of each kind of optimiser."""


class LoraSpec(Spec):
    """Low-rank adapters, which are trained in place of the matrices that they stand beside.

    ``lora=8`` is short for ``lora.rank=8``.
    """

    shorthand: ClassVar[str | None] = "rank"

    rank: int = Field(0, ge=0, le=65536, description="r: columns of a factor; 0 for no adapters")
    alpha: float | None = Field(
        None, gt=0.0, description="α: what adapters give is multiplied by α/r; null for r, a factor of 1"
    )
    layers: tuple[str, ...] = Field(
        (),
        description="patterns such as *.attention.* of the linear layers with adapters; none for all in the "
        "model's blocks",
    )

    @property
    def scale(self) -> float:
        """What adapters give is multiplied by, α/r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def __str__(self) -> str:
        return f"rank {self.rank}" if self.rank else "none"


class OptimizerSpec(OpenSpec):
    """An optimiser with its hyperparameters, fields beside ``kind``: ``{kind: sgd, momentum: 0.8}``.

    ``optimizer=muon`` is short for ``optimizer.kind=muon``.
    """

    shorthand: ClassVar[str | None] = "kind"
    open_to: ClassVar[str | None] = "kind"

    kind: Literal["adamw", "sgd", "muon", "adafactor"] = Field(
        "adamw",
        description="adamw, sgd, muon (orthogonalised momentum for the matrices of the body, AdamW for "
        "embeddings, head, biases, norms and what losses learn) or adafactor",
    )
    lr: float = Field(
        3e-3, gt=0.0, le=10.0, description="peak learning rate; of adafactor the largest relative step"
    )
    weight_decay: float = Field(
        0.1,
        ge=0.0,
        description="decay of parameters with two or more axes: decoupled from the gradient, but added to it "
        "by sgd",
    )
    clip_norm: float | None = Field(
        1.0, gt=0.0, description="largest global gradient norm; null for no limit"
    )
    only: tuple[str, ...] = Field(
        (),
        description="patterns such as layers.[01].feed_forward.* of the parameters that are trained; all "
        "others stay as they are; none for all",
    )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """What the kind has of its own, defaults included."""
        return dict(self.model_extra or {})

    def further_fields(self) -> list[tuple[str, str, str]]:
        """See :meth:`Spec.further_fields`: what the kind has of its own."""
        own = _FIELDS[self.kind].model_validate(self.hyperparameters)
        return [(field.path, field.meaning, field.allowed) for field in fields_in_words(own)]

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Check what the kind has of its own and give the rest its defaults, which are stored with a run."""
        own = _FIELDS[self.kind]
        for name, value in self.hyperparameters.items():
            if name not in own.model_fields:
                raise ValueError(f"{name}={value!r}: {self._why_not(name)}")
        found = own.parse(self.hyperparameters, source=f"kind={self.kind}")
        replace_extra(self, found.model_dump())
        return self

    def _why_not(self, name: str) -> str:
        """Return why the kind has no field of a name, and what would do."""
        others = [kind for kind, fields in _FIELDS.items() if name in fields.model_fields]
        if others:
            return f"kind={self.kind} does not read it; it is of kind={' and '.join(others)}"
        known = [*type(self).model_fields, *_FIELDS[self.kind].model_fields]
        guess = nearest(name, known)
        hint = f"did you mean {guess}?" if guess else f"known: {', '.join(known)}"
        return f"unknown key of kind={self.kind}; {hint}"


class ScheduleSpec(Spec):
    """The learning rate over steps, as a factor of its peak."""

    kind: Literal["constant", "cosine", "linear", "wsd", "inverse-sqrt"] = Field(
        "cosine",
        description="shape after the warm-up; wsd is warm-up, stable, decay; inverse-sqrt falls with the "
        "root of the step",
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear growth from 0 to the peak")
    decay_steps: int = Field(0, ge=0, description="last steps of wsd, in which the rate falls")
    decay: Literal["linear", "1-sqrt"] = Field(
        "linear",
        description="how it falls then: linearly, or with the root of their share that is done",
    )
    final_fraction: Fraction = Field(
        0.0, description="share of the peak that is left at the last step of cosine, linear and wsd"
    )

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if self.decay != "linear" and self.kind != "wsd":
            raise ValueError(f"decay={self.decay}: kind={self.kind} does not read it; it is of kind=wsd")
        return self
