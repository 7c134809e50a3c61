"""Singing-voice separation: its loss in closed form, its network, and a song taken apart."""

import io
import math

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.tasks import parse_train_spec
from lossworks.training.weights.export import export_run, predict_file
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_training


def songs(**changes):
    """Return a small spec."""
    values = {
        "task": "separation",
        "steps": 4,
        "batch_size": 16,
        "workers": 1,
        "sharding": "none",
        "data": {"source": "songs:4", "seconds": 1.0, "window": 64, "fft": 64, "hop": 32},
        "model": {"maps": 2, "hidden": 64, "kernel": 4},
        "optimizer": {"lr": 0.003},
        "evaluation": {"every": 4},
        "checkpoint": {"every": 4},
        "tracking": {"model": False},
    }
    return {**values, **changes}


def test_the_loss_is_the_stable_form_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    y = 5 * torch.randn(6, 7, dtype=torch.float64, generator=generator)
    mask = torch.randint(0, 2, (6, 7), generator=generator).double()
    t = 0.02 + 0.96 * mask

    expected = (y.clamp(min=0) - y * t + torch.log1p(torch.exp(-y.abs()))).mean()

    assert create("ibm-mask")(y, mask) == pytest.approx(float(expected))


def test_softened_targets_have_a_floor():
    mask = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    best = torch.logit(0.02 + 0.96 * mask)

    floor = create("ibm-mask")(best, mask)

    assert floor == pytest.approx(0.09804, abs=1e-5)
    assert floor == pytest.approx(-0.98 * math.log(0.98) - 0.02 * math.log(0.02))
    assert create("ibm-mask")(best + 0.3, mask) > floor


def test_voices_come_nearer_in_training(tmp_path):
    values = songs(steps=80, evaluation={"every": 40}, checkpoint={"every": 80})

    result = run_training(values, None, str(tmp_path))

    gains = [row["eval/gnsdr"] for _, row in result["rows"] if "eval/gnsdr" in row]
    assert gains[-1] > 1.0
    assert gains[-1] < result["metrics"]["eval/ideal_gnsdr"]
    assert losses(result)[-1] < losses(result)[0]


def test_two_ranks_give_what_one_process_gives(tmp_path):
    one = run_training(songs(), None, str(tmp_path / "one"))
    split = songs(workers=2, sharding="fsdp", micro_batch_size=3)
    two = run_ranks(2, run_training, split, None, str(tmp_path / "two"), folder=tmp_path)[0]

    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    for name in ("eval/bin_accuracy", "eval/gnsdr"):
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-2, abs=1e-2)


def test_pretraining_learns_the_spectrogram_first(tmp_path):
    pretrained = songs(methods=[{"name": "spectrogram-pretraining", "steps": 2}])

    first, second = (run_training(v, None, str(tmp_path / n)) for v, n in ((songs(), "a"), (pretrained, "b")))

    assert losses(first)[0] != losses(second)[0]
    assert losses(second)[2:] != losses(first)[2:]
    assert second["status"] == "finished"


def test_a_wav_file_becomes_two_that_add_up_at_threshold_zero(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    run = run_in_folder(songs(model={"maps": 2, "hidden": 64, "kernel": 4, "threshold": 0.0}))
    export_run(run, tmp_path / "model")
    stereo = np.random.default_rng(0).integers(-9000, 9000, (12000, 2), dtype=np.int16)
    wavfile.write(tmp_path / "song.wav", 12000, stereo)

    found = predict_file(str(tmp_path / "model"), tmp_path / "song.wav")

    parts = [wavfile.read(io.BytesIO(found.files[name]()))[1] for name in ("voice.wav", "accompaniment.wav")]
    assert [len(part) for part in parts] == [8000, 8000]  # a second at the model's rate
    assert any("resampled" in note for note in found.notes)
    assert any("channels" in note for note in found.notes)
    mixture = np.asarray(found.columns["loudness"])
    assert (mixture > 0).all()
    from lossworks.data.audio.wav_files import read_wav

    np.testing.assert_allclose(parts[0] + parts[1], read_wav(tmp_path / "song.wav", 8000).samples, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"frames": 4}}, "frames=4"),
        ({"data": {"hop": 200}}, "hop=200"),
        ({"data": {"source": "songs:1"}}, "N from 2"),
        ({"model": {"hidden": 30}}, "hidden=30"),
        ({"loss": "cross-entropy"}, "can't train task=separation"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, named):
    with pytest.raises(UserError, match=named):
        parse_train_spec(songs(**changes))


def test_a_pool_that_leaves_nothing_is_refused():
    from lossworks.tasks.registry import task_of

    spec = parse_train_spec(songs(model={"maps": 2, "hidden": 64, "pool": 8}))

    with pytest.raises(UserError, match=r"model.pool=8"):
        task_of(spec).prepare(spec)
