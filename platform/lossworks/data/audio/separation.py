"""A voice taken out of a song by a mask of its spectra, and how well that went.

After Lin, Balamurali, Koh, Lui and Herremans, *Singing Voice Separation Using a Deep Convolutional Neural
Network Trained by Ideal Binary Mask and Cross Entropy*, Neural Computing and Applications 2018.
"""

from collections.abc import Sequence

import numpy as np

from lossworks.data.audio.songs import Song
from lossworks.data.audio.spectra import FrontEnd

TAPS = 512
"""Length of the filter by which an estimate may differ from its reference for nothing, in samples."""

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(11))
"""Of masks, from 0 to 0.5: those that the paper tries."""

_RIDGE = 1e-11  # of a filter, in the energy of the reference
_MOST = 100.0  # dB; above it is rounding, and below it silence


def ideal_mask(voice: np.ndarray, accompaniment: np.ndarray) -> np.ndarray:
    """Return the ideal binary mask of spectra (F, T): where the voice is louder, bool (F, T)."""
    louder: np.ndarray = np.abs(voice) > np.abs(accompaniment)
    return louder


def softened(mask: np.ndarray, softness: float = 0.02) -> np.ndarray:
    """Return a binary mask (…) as probabilities: 1 - softness and softness in the place of 1 and 0, float32.

    A model's cross-entropy to them can't fall below the entropy H(softness), 0.09804 nats for 0.02.
    """
    return np.where(mask, 1 - softness, softness).astype(np.float32)


def kept(probability: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Return factors for the voice's spectra and for the rest's: m = p·1[p ≥ θ], and the same of 1 - p.

    Args:
        probability: That a bin is the voice's, (F, T).
        threshold: θ; at 0 both factors add up to 1.
    """
    rest = 1 - probability
    return probability * (probability >= threshold), rest * (rest >= threshold)


def separated(mixture: np.ndarray, probability: np.ndarray, front: FrontEnd, threshold: float) -> Song:
    """Return the parts of a mixture (n,): its spectra times both factors, with the mixture's own phases.

    Args:
        mixture: Samples (n,).
        probability: That a bin of its spectra is the voice's, (F, T).
        front: How it becomes spectra.
        threshold: See :func:`kept`.
    """
    spectra = front.spectra(mixture)
    parts = (front.samples(spectra * factor, len(mixture)) for factor in kept(probability, threshold))
    return Song(*parts)


def sdr(reference: np.ndarray, estimate: np.ndarray, taps: int = TAPS) -> float:
    """Return the signal-to-distortion ratio of BSS Eval, in dB, between -100 and 100.

    The estimate is split into what a filter of so many taps makes of the reference, and the rest: SDR is ten
    times the decimal logarithm of the ratio of their energies (Vincent, Gribonval and Févotte, *Performance
    Measurement in Blind Audio Source Separation*, 2006). With one tap only a factor is for nothing.

    Args:
        reference: Samples (n,), not all of them 0.
        estimate: Samples (n,).
        taps: At least 1.

    Raises:
        ValueError: The reference is silent, or the lengths differ.
    """
    from scipy.linalg import solve

    if reference.shape != estimate.shape or not reference.any():
        raise ValueError(
            f"reference {reference.shape} must sound and be as long as estimate {estimate.shape}"
        )
    taps = min(taps, len(reference))
    own, cross = _correlations(reference, reference, taps), _correlations(reference, estimate, taps)
    gram = own[np.abs(np.subtract.outer(np.arange(taps), np.arange(taps)))]
    # Two delays of a tone give all others: of the many best filters a small ridge takes the shortest. What is
    # left is taken exactly for the filter that was found.
    best = solve(gram + _RIDGE * own[0] * np.eye(taps), cross, assume_a="pos")
    explained = float(best @ gram @ best)
    rest = float(estimate @ estimate - 2 * best @ cross) + explained
    ratio = max(explained, 0.0) / max(rest, 1e-300)
    return float(np.clip(10 * np.log10(max(ratio, 1e-300)), -_MOST, _MOST))


def _correlations(reference: np.ndarray, other: np.ndarray, taps: int) -> np.ndarray:
    """Return ⟨reference delayed by k samples, other⟩ for k = 0 … taps - 1; both go on with zeros."""
    from scipy.fft import irfft, next_fast_len, rfft

    length = next_fast_len(len(reference) + taps)
    product = rfft(other, length) * np.conj(rfft(reference, length))
    found: np.ndarray = irfft(product, length)[:taps]
    return found


def nsdr(reference: np.ndarray, estimate: np.ndarray, mixture: np.ndarray, taps: int = TAPS) -> float:
    """Return how much nearer to the reference an estimate is than the mixture: a difference of SDR, in dB."""
    return sdr(reference, estimate, taps) - sdr(reference, mixture, taps)


def gnsdr(songs: Sequence[Song], estimates: Sequence[Song], taps: int = TAPS) -> tuple[float, float]:
    """Return NSDR of voices and of accompaniments, means over songs weighted by length, in dB.

    Songs of which a part is silent are left out; without any left both are 0.

    Args:
        songs: As they are.
        estimates: What was made of their mixtures.
        taps: See :func:`sdr`.
    """
    pairs = [
        (song, found)
        for song, found in zip(songs, estimates, strict=True)
        if song.voice.any() and song.accompaniment.any()
    ]
    total = max(sum(len(song.voice) for song, _ in pairs), 1)
    gains = [
        sum(len(song.voice) * nsdr(song[part], found[part], song.mixture, taps) for song, found in pairs)
        / total
        for part in range(2)
    ]
    return gains[0], gains[1]


def swept(
    songs: Sequence[Song], probabilities: Sequence[np.ndarray], front: FrontEnd, taps: int = TAPS
) -> dict[float, tuple[float, float]]:
    """Return GNSDR of voice and accompaniment at each of :data:`THRESHOLDS`.

    Args:
        songs: As they are.
        probabilities: Of each song's mixture, (F, T).
        front: How mixtures become spectra.
        taps: See :func:`sdr`.
    """
    return {
        threshold: gnsdr(
            songs,
            [
                separated(song.mixture, p, front, threshold)
                for song, p in zip(songs, probabilities, strict=True)
            ],
            taps,
        )
        for threshold in THRESHOLDS
    }
