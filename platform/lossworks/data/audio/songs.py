"""Songs in two parts: drawn, or read from files."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from lossworks.data.audio.singing import sing
from lossworks.data.audio.wav_files import read_wav
from lossworks.errors import UserError

_PARTS = ("voice", "accompaniment")


class Song(NamedTuple):
    """A mixture and its two parts, float64 (n,) each.

    Attributes:
        voice: What is to be found.
        accompaniment: The rest.
    """

    voice: np.ndarray
    accompaniment: np.ndarray

    @property
    def mixture(self) -> np.ndarray:
        """The sum of both."""
        found: np.ndarray = self.voice + self.accompaniment
        return found


class ReadSongs(NamedTuple):
    """What a folder holds.

    Attributes:
        songs: In the order of their names.
        names: Of the files, without their ending.
        notes: What was done to files, a sentence each.
    """

    songs: list[Song]
    names: list[str]
    notes: tuple[str, ...]


def draw_songs(count: int, seconds: float, rate: int, seed: int) -> list[Song]:
    """Return songs of a voice over chords, each a function of seed and number; see :func:`sing`.

    Args:
        count: How many.
        seconds: Of each.
        rate: Samples a second.
        seed: Of all.
    """
    streams = (np.random.default_rng([seed, number]) for number in range(count))
    return [Song(*sing(stream, max(1, round(seconds * rate)), rate)) for stream in streams]


def read_songs(path: Path, rate: int) -> ReadSongs:
    """Return the songs of a folder with voice/ and accompaniment/, WAV files of equal names and lengths.

    Args:
        path: The folder.
        rate: Samples a second that are wanted.

    Raises:
        UserError: A file can't be read, has no partner, or another length than that.
    """
    files = {part: _files(path / part) for part in _PARTS}
    for part, other in (_PARTS, _PARTS[::-1]):
        for name, file in files[part].items():
            if name not in files[other]:
                raise UserError(f"{file}: there is no {path / other / name}.wav; names must be equal")
    songs, notes = [], []
    for name, file in files["voice"].items():
        sounds = [read_wav(one, rate) for one in (file, files["accompaniment"][name])]
        lengths = [len(sound.samples) for sound in sounds]
        if lengths[0] != lengths[1]:
            raise UserError(
                f"{file}: has {lengths[0]} samples at {rate} a second; its accompaniment {lengths[1]}"
            )
        songs.append(Song(*(sound.samples for sound in sounds)))
        notes += [note for sound in sounds for note in sound.notes]
    return ReadSongs(songs, list(files["voice"]), tuple(notes))


def _files(folder: Path) -> dict[str, Path]:
    """Return a folder's WAV files by name, sorted; what is hidden is left out."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; voice/ and accompaniment/ with WAV files are needed")
    found = {
        file.stem: file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() == ".wav" and not file.name.startswith(".")
    }
    if not found:
        raise UserError(f"{folder}: holds no WAV files")
    return found
