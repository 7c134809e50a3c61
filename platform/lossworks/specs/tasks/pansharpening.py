"""The parts of specs that say which bands are sharpened, and by what network."""

from pydantic import Field, field_validator

from lossworks.specs.base import Spec


class CubeSpec(Spec):
    """A cube of many bands of low resolution, and a panchromatic image of the same scene of a high one."""

    source: str = Field(
        "scene:96",
        description="scene:SIDE (a scene of SIDE pixels that is drawn from the seed, whose sharp bands are "
        "known) or npz:PATH (bands (C, h, w) and pan (R·h, R·w), and truth (C, R·h, R·w) if it is known)",
    )
    bands: int = Field(12, ge=2, le=1024, description="of a drawn scene: bands, C")
    ratio: int = Field(4, ge=2, le=16, description="of a drawn scene: R, sharp pixels a side of a coarse one")
    noise: float = Field(0.005, ge=0.0, le=1.0, description="of a drawn scene: deviation of the bands' noise")

    @property
    def side(self) -> int | None:
        """Pixels a side of a drawn scene; None where it is read."""
        kind, _, name = self.source.partition(":")
        return int(name) if kind == "scene" else None

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if (kind == "scene" and name.isdigit() and 16 <= int(name) <= 4096) or (kind == "npz" and name):
            return value
        raise ValueError("must be scene:SIDE, with SIDE from 16 to 4096 pixels, or npz:PATH")


class PansharpenerSpec(Spec):
    """A small network that adds detail to a band: three convolutions."""

    features: tuple[int, int] = Field((48, 32), description="features after the first and second convolution")

    @field_validator("features")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError("must be two numbers of at least 1")
        return value
