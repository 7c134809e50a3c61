"""The spec part ``devices``: speeds, bandwidths, latency and availability of clients' devices."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from lossworks.specs import Spec


class LognormalSpec(Spec):
    """A positive number whose logarithm is normal."""

    median: float = Field(gt=0.0, le=1e18, description="half of the clients are below")
    sigma: float = Field(
        1.0,
        ge=0.0,
        le=10.0,
        description="standard deviation of the logarithm: 1 puts a tenth below 0.28 medians",
    )


class UniformSpec(Spec):
    """A number between two, all alike."""

    low: float = Field(gt=0.0, le=1e18, description="least")
    high: float = Field(gt=0.0, le=1e18, description="largest")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} is above high={self.high:g}")
        return self


class AmountSpec(Spec):
    """A number of every client: the same, or drawn once for each from the seed."""

    shorthand: ClassVar[str | None] = "constant"

    constant: float | None = Field(None, gt=0.0, le=1e18, description="the same for all clients")
    lognormal: LognormalSpec | None = Field(None, description="median and sigma of a draw for each client")
    uniform: UniformSpec | None = Field(None, description="low and high of a draw for each client")

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("constant", "lognormal", "uniform") if getattr(self, name) is not None]
        if len(given) != 1:
            says = " and ".join(given) if given else "nothing"
            raise ValueError(
                f"holds {says}; give one of constant, lognormal and uniform, such as {{constant: 5}}"
            )
        return self


class AvailabilitySpec(Spec):
    """When devices are there: ``availability=0.8`` is short for ``availability.share=0.8``."""

    shorthand: ClassVar[str | None] = "share"

    share: AmountSpec | None = Field(
        None, description="share of the time slots in which a client is there, drawn for each slot anew"
    )
    slot_s: float = Field(600.0, gt=0.0, le=1e9, description="virtual seconds of such a slot")
    trace: str | None = Field(
        None,
        min_length=1,
        description="CSV file in place of share, with the columns client, from and until: the virtual "
        "seconds from which and until which a client is there; those without a row never are",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.share is None) == (self.trace is None):
            raise ValueError("give one of share and trace")
        if self.share is not None and (self.share.constant or 0.0) > 1:
            raise ValueError(f"share={self.share.constant:g}: must be at most 1")
        return self


class DevicesSpec(Spec):
    """Devices of the clients, from which the virtual seconds of a reply follow.

    They are examples · epochs / speed + bytes / bandwidth, down and up, + latency.
    """

    speed: AmountSpec | None = Field(
        None, description="examples a second that a device trains on; null for infinitely many"
    )
    bandwidth_down: AmountSpec | None = Field(
        None, description="bytes a second to a device; null for infinitely many"
    )
    bandwidth_up: AmountSpec | None = Field(
        None, description="bytes a second from a device; null for infinitely many"
    )
    latency: AmountSpec | None = Field(None, description="seconds added to each reply; null for none")
    availability: AvailabilitySpec | None = Field(
        None, description="when devices are there, as a share of slots or a trace; null for always"
    )

    @property
    def declared(self) -> bool:
        """Whether anything is said, so that virtual time passes."""
        return any(getattr(self, name) is not None for name in type(self).model_fields)
