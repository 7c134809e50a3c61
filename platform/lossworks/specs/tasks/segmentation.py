"""The part of specs that says which images are read with a class for each pixel, and how they are changed."""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Spec

DRAWN_MASKS = ("walls", "vessels", "shapes", "tinted", "voices")
"""Kinds of images that are drawn with their masks."""

_FORMS = ", ".join([*(f"{kind}:N" for kind in DRAWN_MASKS), "folder:PATH", "npz:PATH"]) + " or hf:NAME"

Domain = Literal["source", "target"]


class AugmentationSpec(Spec):
    """What is changed of an image at each visit, by chance: its mask follows where places move."""

    flip: bool = Field(False, description="turn rows round, and columns, each with probability 1/2")
    turn: bool = Field(
        False,
        description="turn by quarters of a circle, all four alike; images that aren't square, by halves",
    )
    scale: float = Field(
        1.0,
        ge=1.0,
        le=4.0,
        description="magnify by a factor between 1/scale and scale, log-uniform; the mask by its nearest "
        "pixels; what comes from beyond the border counts for nothing",
    )
    brightness: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="add up to so much, up or down, in the unit of the pixels: 0 to 1 from black to white",
    )
    contrast: float = Field(
        1.0,
        ge=1.0,
        le=10.0,
        description="multiply distances from the image's mean by a factor between 1/contrast and contrast, "
        "log-uniform",
    )
    random_hue: bool = Field(
        False,
        description="with probability 1/2 give all pixels one hue, and add a number below 1/2 to their "
        "saturation and one to their brightness (TopoMortar); for images of three colours",
    )


class MasksSpec(Spec):
    """Images with a class for each pixel, how they are split, and what is done to training images."""

    source: str = Field(
        "walls:200",
        description="walls:N (brick walls, whose mortar is to be found), vessels:N (branching vessels), "
        "shapes:N (discs, squares, triangles and stars, a class each), tinted:N (the same, a hue for each "
        "class), voices:N (spectrograms of singing over chords, where the voice is the louder part), all N "
        "drawn from the seed; folder:PATH (images/ "
        "and masks/ with files of equal names: PNG, JPEG, TIFF or NPY), npz:PATH (x (N, H, W), (N, C, H, W) "
        "or (N, H, W, C), and y (N, H, W)) or hf:NAME (the datasets library; needs a network)",
    )
    side: int = Field(96, ge=32, le=2048, description="of drawn images: pixels a side")
    labels: Literal["accurate", "noisy", "weak"] = Field(
        "accurate",
        description="masks of drawn training images: accurate; noisy (edges moved by about "
        "0.8 pixels, parts broken out, spots added); weak (pixels of the blurred image go to the nearer of "
        "the mean colours of object and background). Held-out masks are always accurate",
    )
    domain: Domain = Field(
        "source",
        description="how drawn training images look: target has other colours, light, noise, and part of "
        "its contrast turned round, with the same masks",
    )
    held_out_domain: Domain | None = Field(
        None, description="how drawn held-out images look; as those in training if unset"
    )
    held_out_fraction: float = Field(
        0.25, gt=0.0, lt=1.0, description="share of the images kept for evaluation"
    )
    standardise: bool = Field(
        True, description="subtract the mean and divide by the deviation of every channel over training data"
    )
    classes: tuple[str | int, ...] | None = Field(
        None,
        min_length=2,
        description="names of the classes that are kept, in the order of their numbers; pixels of others "
        "count for nothing; all if unset",
    )
    foreground: bool = Field(
        False, description="make one class, foreground, of all but the first, which is the background"
    )
    ignore: int | None = Field(
        255,
        ge=0,
        le=65535,
        description="value in masks of pixels that count for nothing; null for none. Where masks hold 0 and "
        "255 alone, these are two classes",
    )
    patch: int = Field(
        0,
        ge=0,
        le=4096,
        description="pixels a side of the patch of an image that training takes at each visit, anywhere in "
        "it; 0 takes whole images, which must then be of one size",
    )
    augment: AugmentationSpec = AugmentationSpec()
    unlabelled: bool = Field(
        False,
        description="there are no masks, and of drawn images none are read: for losses such as sfda, which "
        "adapt a trained model (start); of folder:PATH images/ is read, or the pictures in PATH itself",
    )
    priors: str | None = Field(
        None,
        min_length=1,
        description="shares of the classes that each training image is expected to have, for sfda: csv:PATH, "
        "with a column image (names without endings) and one for each class, or exact: its mask's own",
    )
    input: str = Field("image", min_length=1, description="column of an hf data set with the image")
    label: str = Field("mask", min_length=1, description="column of an hf data set with the mask")
    follow_links: bool = Field(False, description="whether a folder's links to files outside of it are read")

    @property
    def from_path(self) -> bool:
        """Whether the images are somebody's own, which may change."""
        return self.source.partition(":")[0] not in DRAWN_MASKS

    @property
    def labelled(self) -> bool:
        """Whether there are masks to measure by."""
        return not (self.unlabelled and self.from_path)

    @property
    def looks(self) -> tuple[Domain, Domain]:
        """The domains of drawn training images and of drawn held-out ones."""
        return self.domain, self.held_out_domain or self.domain

    @field_validator("priors")
    @classmethod
    def _are_known(cls, value: str | None) -> str | None:
        if value in (None, "exact") or (value.startswith("csv:") and len(value) > 4):
            return value
        raise ValueError("must be exact or csv:PATH")

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        kind, colon, name = value.partition(":")
        drawn = kind in DRAWN_MASKS and name.isdigit() and 4 <= int(name) <= 100_000
        if drawn or (colon and name and kind in ("folder", "npz", "hf")):
            return value
        raise ValueError(f"must be one of {_FORMS}, with N from 4 to 100000")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.unlabelled and self.from_path and not self.source.startswith("folder:"):
            raise ValueError(f"unlabelled=true is for folder:PATH and drawn images, not source={self.source}")
        if self.unlabelled and self.priors == "exact":
            raise ValueError("priors=exact is what masks say, and with unlabelled=true there are none")
        if self.from_path:
            for name in ("labels", "domain", "held_out_domain"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is for drawn images; source={self.source} has its own"
                    )
        if self.source.startswith("voices:") and self.augment.random_hue:
            raise ValueError(
                f"augment.random_hue=true is for images of three colours; {self.source} has one channel"
            )
        return self
