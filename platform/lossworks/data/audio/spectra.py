"""Spectra of sound over time, and sound from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.signal import ShortTimeFFT


@dataclass(frozen=True)
class FrontEnd:
    """How sound becomes spectra: F = fft/2 + 1 frequencies, T frames.

    Attributes:
        rate: Samples a second.
        window: Samples of the Hann window, whose values add up to 1.
        fft: Samples of the Fourier transform, filled up with zeros; at least ``window``.
        hop: Samples from one frame to the next, at most half of ``window``.

    Raises:
        ValueError: A number is out of range.
    """

    rate: int = 22050
    window: int = 1024
    fft: int = 4096
    hop: int = 256

    def __post_init__(self) -> None:
        if self.rate < 1 or self.window < 4 or self.fft < self.window or not 0 < self.hop <= self.window // 2:
            raise ValueError(
                f"{self}: needs rate >= 1, window >= 4, fft >= window and 1 <= hop <= window/2, "
                "or sound can't be made of spectra again"
            )

    @property
    def bins(self) -> int:
        """Number of frequencies, F."""
        return self.fft // 2 + 1

    @cached_property
    def _transform(self) -> "ShortTimeFFT":
        from scipy.signal import ShortTimeFFT, get_window

        return ShortTimeFFT(
            get_window("hann", self.window), self.hop, self.rate, mfft=self.fft, scale_to="magnitude"
        )

    def spectra(self, samples: np.ndarray) -> np.ndarray:
        """Return spectra (F, T), complex128, of samples (n,); what comes before and after them is silence."""
        padded = np.zeros(max(len(samples), self.window))
        padded[: len(samples)] = samples
        found: np.ndarray = self._transform.stft(padded)
        return found

    def samples(self, spectra: np.ndarray, count: int) -> np.ndarray:
        """Return the first ``count`` samples, float64 (count,), that spectra (F, T) are those of."""
        found: np.ndarray = self._transform.istft(spectra, k1=max(count, self.window))
        return found[:count]
