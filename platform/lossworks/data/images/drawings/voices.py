"""Spectrograms of songs that are drawn, in which the bins where the voice is louder are to be found."""

import numpy as np

from lossworks.data.audio.singing import sing
from lossworks.data.audio.spectra import FrontEnd

_RATE = 8000  # samples a second
_RANGE = 80.0  # dB below the loudest bin that count as silence


def draw_voice(stream: np.random.Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the log-magnitudes (1, side, side) of a song, and 1 where its voice is louder than the rest.

    Row f is the f-th frequency from 0 Hz, column t the t-th frame. Levels are in decibels, 0 at 80 dB below
    the loudest bin and 1 at that, float32; the mask is the ideal binary mask, int64.
    """
    front = front_end_of(side)
    voice, others = sing(stream, (side + 8) * front.hop, front.rate)
    spectra = [front.spectra(part)[:side, 6 : 6 + side] for part in (voice, others)]
    loudness = np.abs(spectra[0] + spectra[1])
    decibels = 20 * np.log10(np.maximum(loudness / loudness.max(), 1e-10))
    image = np.clip(1 + decibels / _RANGE, 0, 1)[None].astype(np.float32)
    return image, (np.abs(spectra[0]) > np.abs(spectra[1])).astype(np.int64)


def front_end_of(side: int) -> FrontEnd:
    """Return a front end at 8 kHz whose spectra have at least ``side`` frequencies, 129 or more."""
    fft = max(256, 1 << (2 * side - 2).bit_length())
    return FrontEnd(rate=_RATE, window=fft, fft=fft, hop=fft // 4)
