"""The parts of specs that say which songs are read, and by what network their voices are found."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Spec


class SongsSpec(Spec):
    """Songs of a voice and an accompaniment, and how their sound becomes patches of spectra."""

    source: str = Field(
        "songs:24",
        description="songs:N (N songs of a voice over chords, drawn from the seed) or folder:PATH (voice/ "
        "and accompaniment/ with WAV files of equal names and lengths)",
    )
    seconds: float = Field(3.0, gt=0.2, le=600.0, description="of each drawn song")
    rate: int = Field(8000, ge=1000, le=192000, description="samples a second that all sound is brought to")
    window: int = Field(256, ge=16, le=65536, description="samples of the Hann window of a spectrum")
    fft: int = Field(256, ge=16, le=65536, description="samples of the Fourier transform, at least window")
    hop: int = Field(64, ge=1, le=32768, description="samples from a frame to the next, at most window/2")
    frames: int = Field(5, ge=1, le=99, description="frames of a patch, an odd number")
    patch_hop: int = Field(4, ge=1, le=999, description="frames from a training patch to the next")
    held_out_fraction: float = Field(0.25, gt=0.0, lt=1.0, description="share of songs kept for evaluation")

    @field_validator("source")
    @classmethod
    def _is_known(cls, value: str) -> str:
        kind, _, name = value.partition(":")
        if (kind == "songs" and name.isdigit() and 2 <= int(name) <= 100_000) or (kind == "folder" and name):
            return value
        raise ValueError("must be songs:N, with N from 2 to 100000, or folder:PATH")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fft < self.window:
            raise ValueError(f"fft={self.fft} must be at least window={self.window}")
        if self.hop > self.window // 2:
            raise ValueError(f"hop={self.hop} must be at most half of window={self.window}")
        if self.frames % 2 == 0:
            raise ValueError(f"frames={self.frames} must be odd, so that a patch has a middle")
        return self


class MaskNetSpec(Spec):
    """A small network of convolutions that says of each bin of a patch whether the voice is louder there."""

    maps: int = Field(8, ge=2, le=512, description="maps of the first convolution; an even number")
    kernel: int = Field(12, ge=1, le=128, description="frequencies that a convolution sees; of frames three")
    pool: int = Field(2, ge=1, le=64, description="frequencies that become one after two convolutions")
    hidden: int = Field(512, ge=4, le=16384, description="features of a full layer; the second has a quarter")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="share set to zero before a full layer")
    threshold: float = Field(
        0.2,
        ge=0.0,
        le=0.5,
        description="in predictions: probability below which a part gets nothing",
    )

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.maps % 2 or self.hidden % 4:
            raise ValueError(f"maps={self.maps} must be even, and hidden={self.hidden} a multiple of 4")
        return self
