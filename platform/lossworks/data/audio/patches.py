"""Patches of a few frames of a song's spectra, which a small network reads, and what it says of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lossworks.data.audio.separation import ideal_mask, softened
from lossworks.data.audio.songs import Song
from lossworks.data.audio.spectra import FrontEnd


class Patches(NamedTuple):
    """Patches of songs.

    Attributes:
        inputs: Magnitudes on the scale of each song's mean, float32 (N, frames, F).
        targets: Probabilities that a bin is the voice's, float32 (N, frames, F).
        voice: Magnitudes that the ideal mask leaves of the voice, from 0 to the patch's largest, 1; float32
            (N, frames, F).
    """

    inputs: np.ndarray
    targets: np.ndarray
    voice: np.ndarray


def magnitudes_of(samples: np.ndarray, front: FrontEnd) -> np.ndarray:
    """Return the magnitudes of a track's spectra, divided by their mean over the track, float64 (F, T).

    Levels of tracks differ by orders; a silent track stays 0.
    """
    found = np.abs(front.spectra(samples))
    mean = float(found.mean())
    return np.asarray(found / mean if mean > 0 else found)


def cut_patches(values: np.ndarray, frames: int, hop: int) -> np.ndarray:
    """Return patches (N, frames, F) of values (F, T), the middles of which are ``hop`` frames apart.

    The first has frame 0 in its middle; beyond both ends there are zeros. With ``hop`` 1, N is T.

    Args:
        values: Of bins.
        frames: Of a patch, an odd number.
        hop: At least 1.

    Raises:
        ValueError: ``frames`` is even, or a number is too small.
    """
    if frames < 1 or frames % 2 == 0 or hop < 1:
        raise ValueError(f"frames={frames} must be odd and at least 1, and hop={hop} at least 1")
    around = np.pad(values.T, ((frames // 2, frames // 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(around, frames, axis=0)
    return np.ascontiguousarray(windows[::hop].swapaxes(1, 2))


def middles(patches: np.ndarray) -> np.ndarray:
    """Return values (F, T) from the middle frames of patches (T, frames, F) that were cut with hop 1."""
    return np.ascontiguousarray(patches[:, patches.shape[1] // 2].T)


def patches_of(
    songs: Sequence[Song], front: FrontEnd, frames: int = 9, hop: int = 8, softness: float = 0.02
) -> Patches:
    """Return patches of songs' mixtures with softened ideal masks, those of a song one after the other.

    Args:
        songs: With their parts.
        front: How they become spectra.
        frames: Of a patch, an odd number.
        hop: From one patch to the next.
        softness: See :func:`softened`.
    """
    parts = []
    for song in songs:
        voice = front.spectra(song.voice)
        mask = ideal_mask(voice, front.spectra(song.accompaniment))
        values = (magnitudes_of(song.mixture, front), softened(mask, softness), np.abs(voice) * mask)
        parts.append([cut_patches(one, frames, hop).astype(np.float32) for one in values])
    inputs, targets, voices = (np.concatenate(column) for column in zip(*parts, strict=True))
    most = voices.max((1, 2), keepdims=True)
    return Patches(inputs, targets, (voices / np.where(most > 0, most, 1)).astype(np.float32))
