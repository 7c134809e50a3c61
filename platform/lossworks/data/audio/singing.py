"""Songs that are drawn: a voice of harmonics with vibrato, over chords and a little noise."""

import numpy as np

_SCALE = 220.0 * 2.0 ** (np.array([0, 2, 4, 5, 7, 9, 11, 12, 14]) / 12)  # Hz, of the voice
_CHORDS = ((0, 4, 7), (5, 9, 12), (7, 11, 14), (9, 12, 16))  # semitones over the key
_KEY = 110.0  # Hz, an octave below the voice
_FORMANTS = ((600.0, 250.0), (1300.0, 350.0), (2600.0, 500.0))  # Hz and width: where a voice is loud


def sing(stream: np.random.Generator, samples: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a voice and what accompanies it, float64 (n,) each, both with the same mean power.

    Args:
        stream: Where notes, vibrato and chords are drawn from.
        samples: How many, n, at least 1.
        rate: Samples a second.
    """
    parts = _voice(stream, samples, rate), _chords(stream, samples, rate)
    return tuple(part / max(float(np.sqrt(np.mean(part**2))), 1e-12) for part in parts)  # type: ignore[return-value]


def _voice(stream: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    seconds = np.arange(samples) / rate
    pitch, loudness = _melody(stream, samples, rate)
    depth, speed, start = stream.uniform(25, 60), stream.uniform(5.0, 6.5), stream.uniform(0, 6)
    pitch = pitch * 2 ** (depth * np.sin(2 * np.pi * speed * seconds + start) / 1200)
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    sound = np.zeros(samples)
    for harmonic in range(1, min(24, int(0.48 * rate / pitch.min())) + 1):
        sound += _heard(harmonic * pitch) / harmonic**0.7 * np.sin(harmonic * phase)
    found: np.ndarray = sound * loudness
    return found


def _heard(frequency: np.ndarray) -> np.ndarray:
    """Return how loud a voice is at each sample's frequency (n,) in Hz, which changes slowly."""
    some = frequency[::16]
    level = 0.15 + sum(np.exp(-(((some - centre) / width) ** 2)) for centre, width in _FORMANTS)
    found: np.ndarray = np.repeat(level, 16)[: len(frequency)]
    return found


def _melody(stream: np.random.Generator, samples: int, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Return pitch in Hz and loudness of each sample: notes of 0.15 to 0.5 s, one in six of them a rest."""
    pitch, loudness, at = np.zeros(samples), np.zeros(samples), 0
    first = True
    while at < samples:
        length = int(stream.uniform(0.15, 0.5) * rate) + 1
        stop = min(at + length, samples)
        shape = np.minimum(1.0, np.minimum(np.arange(length), np.arange(length)[::-1]) / (0.02 * rate))
        pitch[at:stop] = stream.choice(_SCALE)
        sounds = first or stream.random() > 1 / 6  # the first always does: no song is without a voice
        loudness[at:stop] = shape[: stop - at] * sounds * stream.uniform(0.6, 1.0)
        at, first = stop, False
    return pitch, loudness


def _chords(stream: np.random.Generator, samples: int, rate: int) -> np.ndarray:
    sound, at = 0.05 * stream.standard_normal(samples), 0
    while at < samples:
        length = int(stream.uniform(0.3, 0.7) * rate) + 1
        seconds = np.arange(min(length, samples - at)) / rate
        for note in _CHORDS[stream.integers(len(_CHORDS))]:
            pitch = _KEY * 2 ** (note / 12)
            for harmonic in range(1, 7):
                fade = np.exp(-seconds * (2 + harmonic)) * np.minimum(1.0, seconds / 0.005)
                tone = np.sin(2 * np.pi * harmonic * pitch * seconds + stream.uniform(0, 2 * np.pi))
                sound[at : at + len(seconds)] += fade * tone / harmonic * (harmonic * pitch < 0.48 * rate)
        at += length
    return sound
