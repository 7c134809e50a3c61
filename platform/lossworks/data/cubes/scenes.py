"""A cube and its panchromatic image: drawn with the sharp bands known, or read from a file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lossworks.data.cubes.sensor import blurred, decimated, interpolated
from lossworks.data.example_sources import existing_file, read_arrays
from lossworks.errors import UserError
from lossworks.specs.tasks.pansharpening import CubeSpec

_SCENE = 91  # what the random stream is for


@dataclass(frozen=True, eq=False)
class Cube:
    """Coarse bands and a panchromatic image of one scene, read by band.

    Attributes:
        bands: Coarse, float32 (C, h, w), in units of ``scale``.
        pan: Float32 (R·h, R·w), in the same units.
        smooth: The bands on the sharp grid by cubic splines, float32 (C, R·h, R·w).
        ratio: R.
        scale: Largest magnitude of the bands as they came, by which everything is divided.
        truth: The sharp bands, float32 (C, R·h, R·w), where they are known.
    """

    bands: np.ndarray
    pan: np.ndarray
    smooth: np.ndarray
    ratio: int
    scale: float
    truth: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.bands)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.bands.nbytes + self.pan.nbytes + 2 * self.smooth.nbytes

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return bands (B,) with what is known of each.

        Returns:
            ``inputs`` (B, 2, H, W), the smooth band and the panchromatic image; ``targets`` (B, h, w), the
            coarse band; ``pan`` (B, H, W); ``sharp`` (B, H, W), NaN where it is not known.
        """
        pan = np.broadcast_to(self.pan, (len(rows), *self.pan.shape))
        sharp = np.full_like(pan, np.nan) if self.truth is None else self.truth[rows]
        arrays = {
            "inputs": np.stack((self.smooth[rows], pan), 1),
            "targets": self.bands[rows],
            "pan": pan.copy(),
            "sharp": sharp,
        }
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def load_cube(spec: CubeSpec, seed: int) -> Cube:
    """Return the cube of a spec.

    Raises:
        UserError: The file can't be read, or its arrays don't belong together.
    """
    if spec.side is not None:
        return draw_scene(spec.side, spec.bands, spec.ratio, spec.noise, seed)
    return read_cube(existing_file(spec.source.partition(":")[2]))


def read_cube(path: Path) -> Cube:
    """Return the cube of an npz file with ``bands``, ``pan`` and perhaps ``truth``.

    Raises:
        UserError: It can't be read, or its arrays don't belong together.
    """
    found = read_arrays(path, ["bands", "pan"], optional=["truth"])
    return cube_of(found, str(path))


def cube_of(arrays: Mapping[str, np.ndarray], source: str) -> Cube:
    """Return the cube of arrays.

    Args:
        arrays: ``bands`` (C, h, w), ``pan`` (R·h, R·w), perhaps ``truth`` (C, R·h, R·w).
        source: Where they are from, for messages.

    Raises:
        UserError: They don't belong together, or hold NaN or Inf.
    """
    bands, pan, truth = arrays["bands"], arrays["pan"], arrays.get("truth")
    if bands.ndim != 3 or pan.ndim != 2 or 0 in bands.shape:
        raise UserError(f"{source}: bands {bands.shape} and pan {pan.shape} must be (C, h, w) and (R·h, R·w)")
    ratio = pan.shape[0] // bands.shape[1]
    if ratio < 2 or pan.shape != (ratio * bands.shape[1], ratio * bands.shape[2]):
        raise UserError(
            f"{source}: pan {pan.shape} must be the same whole number of times, two or more, as high and as "
            f"wide as bands {bands.shape}"
        )
    if truth is not None and truth.shape != (len(bands), *pan.shape):
        raise UserError(f"{source}: truth {truth.shape} must be {(len(bands), *pan.shape)}")
    for name, array in (("bands", bands), ("pan", pan), ("truth", truth)):
        if array is not None and not np.isfinite(array).all():
            raise UserError(f"{source}: {name} holds NaN or Inf, first at {_first_not_finite(array)}")
    scale = float(np.abs(bands).max()) or 1.0
    narrow = [None if one is None else (one / scale).astype(np.float32) for one in (bands, pan, truth)]
    coarse, sharp_pan, sharp = narrow
    if coarse is None or sharp_pan is None:
        raise ValueError("bands and pan are there")
    return Cube(coarse, sharp_pan, interpolated(coarse, ratio).astype(np.float32), ratio, scale, sharp)


def _first_not_finite(array: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis[0]) for axis in np.nonzero(~np.isfinite(array)))


def draw_scene(side: int, bands: int, ratio: int, noise: float, seed: int) -> Cube:
    """Return a scene of fields and roads, each material with a smooth spectrum of its own.

    Args:
        side: Pixels of a sharp band; the last that fill no coarse pixel are left out.
        bands: C.
        ratio: R.
        noise: Deviation of the noise of coarse bands, of a scene in [0, 1].
        seed: Of all that is drawn.
    """
    stream = np.random.default_rng([seed, _SCENE])
    side -= side % ratio
    shares = _materials(stream, side)
    knots = stream.uniform(0.05, 0.95, (len(shares), 5))
    spectra = ndimage.zoom(knots, (1, bands / 5), order=3, mode="nearest", grid_mode=True)[:, :bands].clip(
        0.02, 1
    )
    truth = np.tensordot(spectra.T, shares, 1)
    coarse = decimated(blurred(torch.from_numpy(truth), ratio), ratio).numpy()
    coarse = coarse + noise * stream.standard_normal(coarse.shape)
    return cube_of({"bands": coarse, "pan": truth.mean(0), "truth": truth}, "the scene")


def _materials(stream: np.random.Generator, side: int) -> np.ndarray:
    """Return how much of six materials a pixel has, times the light there, (6, side, side)."""
    centres = stream.uniform(0, side, (24, 2))
    places = np.indices((side, side)).reshape(2, -1).T
    nearest = ((places[:, None] - centres) ** 2).sum(-1).argmin(1).reshape(side, side)
    shares = np.eye(6)[stream.integers(0, 5, len(centres))[nearest]]
    for _ in range(4):
        angle, offset = stream.uniform(0, np.pi), stream.uniform(0.2, 0.8) * side
        along = places @ np.array([np.cos(angle), np.sin(angle)])
        shares[(np.abs(along - offset) < 1.5).reshape(side, side)] = np.eye(6)[5]
    light = 1 + 0.15 * ndimage.gaussian_filter(stream.standard_normal((side, side)), 1.0)
    shares = ndimage.gaussian_filter(shares, (0.6, 0.6, 0)) * light[..., None]
    return np.moveaxis(shares, -1, 0)
