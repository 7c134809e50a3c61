"""WAV files of any depth, rate and number of channels, read as one channel, and written."""

import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lossworks.errors import UserError
from lossworks.files import reading, write_atomically

_CUT_SHORT = "Reached EOF prematurely"  # of scipy's warnings the one that means damage


class Sound(NamedTuple):
    """One channel of sound.

    Attributes:
        samples: Shape (n,), float64; of files with whole numbers between -1 and 1.
        rate: Samples a second.
        notes: What was done to it when it was read, a sentence each.
    """

    samples: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()


def read_wav(path: Path, rate: int | None = None) -> Sound:
    """Return the sound of a WAV file: several channels as their mean, at another rate if that is asked for.

    Args:
        path: The file, of 8, 16, 24 or 32 bits, or of real numbers.
        rate: Samples a second that are wanted; None for the file's own.

    Raises:
        UserError: It can't be read, is cut short, holds nothing, or holds NaN or infinity.
    """
    from scipy.io import wavfile

    if not path.is_file():
        raise UserError(f"{path}: {'is no file' if path.exists() else 'no such file'}")
    with reading(f"{path}, as WAV"), warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no sound
        warnings.filterwarnings("error", _CUT_SHORT, wavfile.WavFileWarning)
        own, data = wavfile.read(path)
    if not data.size or own < 1:
        raise UserError(f"{path}: holds no sound, at {own} samples a second")
    samples, notes = _levels(data), []
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds NaN or infinity")
    if samples.ndim == 2 and samples.shape[1] > 1:
        notes.append(f"{path}: its {samples.shape[1]} channels are mixed to one")
    samples = samples.mean(1) if samples.ndim == 2 else samples
    if rate is not None and rate != own:
        notes.append(f"{path}: is resampled from {own} to {rate} samples a second")
        samples = resampled(samples, own, rate)
    return Sound(samples, rate or own, tuple(notes))


def resampled(samples: np.ndarray, own: int, wanted: int) -> np.ndarray:
    """Return samples (n,) taken ``own`` times a second as they would be taken ``wanted`` times a second."""
    from scipy.signal import resample_poly

    common = math.gcd(own, wanted)
    found: np.ndarray = resample_poly(samples, wanted // common, own // common)
    return found


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write samples (n,) as a WAV file; see :func:`as_wav`."""
    write_atomically(path, as_wav(samples, rate))


def as_wav(samples: np.ndarray, rate: int) -> bytes:
    """Return samples (n,) as the content of a WAV file of 32-bit real numbers: nothing is too loud for it."""
    from scipy.io import wavfile

    file = io.BytesIO()
    wavfile.write(file, rate, samples.astype(np.float32))
    return file.getvalue()


def _levels(data: np.ndarray) -> np.ndarray:
    """Return what a file holds as float64, whole numbers as -1 to 1; of those of 8 bits 128 is silence."""
    if data.dtype.kind == "f":
        return data.astype(np.float64)
    middle = 128 if data.dtype == np.uint8 else 0
    half = 128.0 if data.dtype == np.uint8 else 2.0 ** (8 * data.dtype.itemsize - 1)
    return (data.astype(np.float64) - middle) / half
