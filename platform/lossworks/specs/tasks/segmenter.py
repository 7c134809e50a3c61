"""The part of specs that says which model gives a class to each pixel of an image."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lossworks.specs.base import Spec


class SegmenterSpec(Spec):
    """A model of dense prediction: features of every pixel, and a linear head on them."""

    kind: Literal["unet", "predict-refine", "incremental-unet"] = Field(
        "unet",
        description="unet; predict-refine: a U-Net with an output at each level and a second one that "
        "refines the finest; incremental-unet: a head for each step in which classes arrive",
    )
    levels: int = Field(3, ge=1, le=8, description="how many times the sides are halved")
    width: int = Field(
        16, ge=2, le=1024, description="features a pixel; each coarser level has twice as many"
    )
    groups: int = Field(4, ge=1, le=64, description="groups of GroupNorm; must divide width")
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (),
        description="of incremental-unet: how many classes arrive in each step, such as [2, 1]; together all "
        "but the background, which is the first class",
    )
    window: int = Field(
        512,
        ge=0,
        le=16384,
        description="pixels a side above which images are read by overlapping windows of that side, in "
        "evaluation and prediction; 0 reads all of them whole",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.width % self.groups:
            raise ValueError(f"width={self.width} must be a multiple of groups={self.groups}")
        if (self.kind == "incremental-unet") != bool(self.steps):
            raise ValueError(f"steps={list(self.steps)} are of kind=incremental-unet, which needs them")
        if self.window and self.window < 2**self.levels:
            raise ValueError(f"window={self.window} must be at least 2^levels={2**self.levels} pixels")
        return self
