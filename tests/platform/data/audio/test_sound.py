"""Sound: files of all kinds, spectra and back, and a voice taken out of a song."""

import math
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from lossworks.data.audio.patches import cut_patches, magnitudes_of, middles, patches_of
from lossworks.data.audio.separation import (
    THRESHOLDS,
    gnsdr,
    ideal_mask,
    kept,
    nsdr,
    sdr,
    separated,
    softened,
    swept,
)
from lossworks.data.audio.songs import Song, draw_songs, read_songs
from lossworks.data.audio.spectra import FrontEnd
from lossworks.data.audio.wav_files import read_wav, resampled, write_wav
from lossworks.errors import UserError

SMALL = FrontEnd(rate=8000, window=256, fft=256, hop=64)
FRONTS = [FrontEnd(), SMALL, FrontEnd(rate=8000, window=64, fft=100, hop=32)]
NOISE = np.random.default_rng(0).standard_normal(5000)


def tone(frequency, samples=8000, rate=8000):
    return np.sin(2 * np.pi * frequency * np.arange(samples) / rate)


@pytest.mark.parametrize("front", FRONTS, ids=str)
@pytest.mark.parametrize("samples", [1, 3, 257, 5000])
def test_sound_comes_back_from_its_spectra(front, samples):
    spectra = front.spectra(NOISE[:samples])

    assert spectra.shape[0] == front.bins
    assert np.abs(front.samples(spectra, samples) - NOISE[:samples]).max() < 1e-6


def test_a_tone_s_magnitude_is_half_its_height():
    """The window adds up to 1, and half of a tone is at the negative frequency."""
    spectra = np.abs(SMALL.spectra(3 * tone(1000)))
    assert spectra[32, 20:-20] == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize(
    "values", [(0, 256, 256, 64), (8000, 256, 255, 64), (8000, 256, 256, 129), (8, 2, 4, 1)]
)
def test_spectra_that_give_no_sound_are_refused(values):
    with pytest.raises(ValueError, match=r"1 <= hop <= window/2"):
        FrontEnd(*values)


def test_the_ideal_mask_separates_tones_of_disjoint_bands():
    song = Song(tone(500), 0.7 * tone(2100))
    probability = ideal_mask(SMALL.spectra(song.voice), SMALL.spectra(song.accompaniment)).astype(float)
    found = separated(song.mixture, probability, SMALL, 0.5)

    for part in range(2):
        assert sdr(song[part], found[part], taps=1) > 20
        assert nsdr(song[part], found[part], song.mixture, taps=1) > 15


def test_both_masks_add_to_the_mixture_without_a_threshold():
    p = np.random.default_rng(1).random(SMALL.spectra(NOISE).shape)
    found = separated(NOISE, p, SMALL, 0.0)

    assert np.abs(found.mixture - NOISE).max() < 1e-9
    voice, rest = kept(p, 0.3)
    assert (voice == np.where(p >= 0.3, p, 0)).all()
    assert (rest == np.where(1 - p >= 0.3, 1 - p, 0)).all()


def test_softened_labels_cost_their_entropy():
    labels = softened(np.array([True, False]))
    entropy = -(labels * np.log(labels) + (1 - labels) * np.log(1 - labels))

    assert labels.tolist() == pytest.approx([0.98, 0.02])
    assert entropy == pytest.approx(0.09804, abs=1e-5)


def by_projection(reference, estimate, taps):
    """Return SDR by least squares on delayed copies of the reference, written out."""
    delayed = np.stack([np.pad(reference, (at, taps - 1 - at)) for at in range(taps)], axis=1)
    whole = np.pad(estimate, (0, taps - 1))
    fit = delayed @ np.linalg.lstsq(delayed, whole, rcond=None)[0]
    return 10 * math.log10((fit @ fit) / ((whole - fit) @ (whole - fit)))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(50, 300))
def test_sdr_is_that_of_a_projection(seed, taps, samples):
    stream = np.random.default_rng(seed)
    reference = stream.standard_normal(samples)
    estimate = np.convolve(reference, stream.standard_normal(3))[:samples] + stream.standard_normal(samples)

    assert sdr(reference, estimate, taps) == pytest.approx(by_projection(reference, estimate, taps), abs=1e-6)


def test_sdr_at_its_ends():
    """Whatever a filter does to the reference is for nothing; silence and rounding are cut off at 100 dB."""
    late = np.concatenate((np.zeros(5), NOISE[:-5]))
    assert sdr(NOISE, 3 * NOISE) == 100
    assert sdr(NOISE, 0 * NOISE) == -100
    assert sdr(NOISE, late, 512) > 25
    assert sdr(NOISE, late, 1) < -20
    assert sdr(tone(440), tone(440) + 0.01 * tone(1999), 1) == pytest.approx(40, abs=0.1)
    assert sdr(tone(440), tone(440)) == 100
    with pytest.raises(ValueError, match="must sound"):
        sdr(0 * NOISE, NOISE)
    with pytest.raises(ValueError, match="as long as"):
        sdr(NOISE, NOISE[1:])


def test_gnsdr_weighs_by_length_and_leaves_silence_out():
    songs = draw_songs(2, 0.4, 8000, 0)
    songs = [songs[0], Song(songs[1].voice[:1600], songs[1].accompaniment[:1600])]
    silent = Song(np.zeros(800), np.ones(800))
    gains = [nsdr(song.voice, song.voice + 0.1 * song.accompaniment, song.mixture, 8) for song in songs]
    estimates = [Song(song.voice + 0.1 * song.accompaniment, song.accompaniment) for song in songs]
    found = gnsdr([*songs, silent], [*estimates, silent], 8)

    assert found[0] == pytest.approx((2 * gains[0] + gains[1]) / 3)
    assert found[1] > 50
    assert gnsdr([silent], [silent]) == (0.0, 0.0)


def test_the_ideal_mask_is_a_ceiling_and_noise_gains_nothing():
    songs = draw_songs(2, 1.0, 8000, 1)
    ideal = [ideal_mask(*(SMALL.spectra(part) for part in song)).astype(float) for song in songs]
    best = swept(songs, ideal, SMALL, 32)
    half = swept(songs, [np.full(mask.shape, 0.5) for mask in ideal], SMALL, 32)

    assert list(best) == list(THRESHOLDS) == [round(0.05 * at, 2) for at in range(11)]
    assert best[0.5][0] > 6
    assert half[0.0] == pytest.approx((0, 0), abs=1e-6)


def test_songs_are_a_function_of_the_seed():
    first, again = (draw_songs(2, 0.3, 8000, 5) for _ in range(2))
    assert all((one.voice == other.voice).all() for one, other in zip(first, again, strict=True))
    assert (draw_songs(2, 0.3, 8000, 6)[0].voice != first[0].voice).any()
    for song in first:
        assert [np.sqrt(np.mean(part**2)) for part in song] == pytest.approx([1, 1])


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_patches_give_their_middles_back(frames):
    values = np.random.default_rng(0).random((7, 20))
    patches = cut_patches(values, frames, 1)

    assert patches.shape == (20, frames, 7)
    assert (middles(patches) == values).all()
    half = frames // 2
    assert (patches[10] == values[:, 10 - half : 11 + half].T).all()
    assert (patches[0, :half] == 0).all()
    assert (cut_patches(values, frames, 8) == patches[::8]).all()
    with pytest.raises(ValueError, match="frames=4 must be odd"):
        cut_patches(values, 4, 1)


def test_patches_of_loud_and_soft_songs_are_alike():
    """Magnitudes are on the scale of the track; silence stays silence, and there is no NaN."""
    song = draw_songs(1, 0.5, 8000, 0)[0]
    loud = Song(50 * song.voice, 50 * song.accompaniment)
    one, other = patches_of([song], SMALL, 5), patches_of([loud], SMALL, 5)

    assert (
        one.inputs.shape == one.targets.shape == (math.ceil(SMALL.spectra(song.mixture).shape[1] / 8), 5, 129)
    )
    assert one.inputs == pytest.approx(other.inputs, rel=1e-5)
    assert (one.targets == other.targets).all()
    assert magnitudes_of(song.mixture, SMALL).mean() == pytest.approx(1)
    assert (magnitudes_of(np.zeros(500), SMALL) == 0).all()


@pytest.mark.parametrize(
    ("dtype", "close"), [("uint8", 0.02), ("int16", 1e-4), ("int32", 1e-8), ("float32", 1e-7), ("float64", 0)]
)
def test_files_of_all_depths_are_read_alike(dtype, close, tmp_path):
    sound = 0.9 * tone(440, 400)
    kind = np.dtype(dtype)
    top = {"u": 127, "i": 2.0 ** (8 * kind.itemsize - 1) - 1, "f": 1}[kind.kind]
    middle = 128 if kind.kind == "u" else 0
    wavfile.write(tmp_path / "a.wav", 8000, (middle + top * sound).astype(kind))
    found = read_wav(tmp_path / "a.wav")

    assert found.rate == 8000
    assert found.notes == ()
    assert np.abs(found.samples - sound).max() <= close


def test_24_bits_stereo_and_other_rates(tmp_path):
    """Channels are mixed, and rates changed, with a note; the same tone comes out."""
    path = tmp_path / "a.wav"
    left, right = 0.6 * tone(440, 44100, 44100), 0.2 * tone(440, 44100, 44100)
    whole = (np.stack((left, right), axis=1) * 2**23).astype("<i4").reshape(-1, 1).view(np.uint8)
    with wave.open(str(path), "wb") as file:
        file.setparams((2, 3, 44100, 0, "NONE", ""))
        file.writeframes(whole.reshape(-1, 4)[:, :3].tobytes())
    own, slow = read_wav(path), read_wav(path, 22050)

    assert own.notes == (f"{path}: its 2 channels are mixed to one",)
    assert own.samples == pytest.approx((left + right) / 2, abs=1e-6)
    assert slow.notes[1] == f"{path}: is resampled from 44100 to 22050 samples a second"
    assert len(slow.samples) == 22050
    middle = slice(2000, 20000)
    assert slow.samples[middle] == pytest.approx(0.4 * tone(440, 22050, 22050)[middle], abs=2e-3)
    assert len(resampled(NOISE, 8000, 8001)) == 5001


def test_what_is_written_is_read_again(tmp_path):
    write_wav(tmp_path / "a.wav", 3 * NOISE, 8000)
    assert read_wav(tmp_path / "a.wav").samples == pytest.approx(3 * NOISE, rel=1e-6)


def test_files_that_are_damaged_or_no_sound_are_refused_by_name(tmp_path):
    path = tmp_path / "a.wav"
    wavfile.write(path, 8000, (tone(440) * 1000).astype(np.int16))
    good = path.read_bytes()
    for content in (b"", b"text", good[:20], good[:40], good[:45], good[:1001], good[: len(good) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.wav"):
            read_wav(path)
    for data, message in (
        (np.zeros(0, np.int16), "holds no sound"),
        (np.array([0, np.nan], np.float32), "holds NaN or infinity"),
    ):
        wavfile.write(path, 8000, data)
        with pytest.raises(UserError, match=message):
            read_wav(path)
    with pytest.raises(UserError, match="no such file"):
        read_wav(tmp_path / "b.wav")
    with pytest.raises(UserError, match="is no file"):
        read_wav(tmp_path)


def test_songs_are_read_in_pairs(tmp_path):
    """By name and at one rate; what has no partner, or another length, is refused by name."""
    songs = draw_songs(3, 0.2, 16000, 0)
    for part in ("voice", "accompaniment"):
        (tmp_path / part).mkdir()
        for number, song in enumerate(songs):
            write_wav(tmp_path / part / f"{number}.wav", getattr(song, part), 16000)
    own, slow = read_songs(tmp_path, 16000), read_songs(tmp_path, 8000)

    assert own.names == ["0", "1", "2"]
    assert own.notes == ()
    for song, found in zip(songs, own.songs, strict=True):
        assert found.mixture == pytest.approx(song.mixture, abs=1e-5)
    assert len(slow.notes) == 6
    assert len(slow.songs[0].voice) == 1600
    write_wav(tmp_path / "voice/1.wav", songs[1].voice[:-5], 16000)
    with pytest.raises(
        UserError, match=r"voice/1.wav: has 3195 samples at 16000 a second; its accomp.* 3200"
    ):
        read_songs(tmp_path, 16000)
    (tmp_path / "voice/1.wav").unlink()
    with pytest.raises(UserError, match=r"accompaniment/1.wav: there is no .*voice/1.wav; names must be"):
        read_songs(tmp_path, 16000)
    (tmp_path / "voice/0.wav").unlink()
    (tmp_path / "voice/2.wav").unlink()
    with pytest.raises(UserError, match=r"voice: holds no WAV files"):
        read_songs(tmp_path, 16000)
    with pytest.raises(UserError, match=r"images/voice: no such folder"):
        read_songs(tmp_path / "images", 16000)
