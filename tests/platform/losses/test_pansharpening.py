"""Zero-shot pansharpening: its losses in closed form, its switch, its budgets, and a band's whole way."""

import numpy as np
import pytest
import torch

from lossworks.data.cubes import blurred, decimated, interpolated
from lossworks.data.cubes.scenes import cube_of, draw_scene
from lossworks.data.cubes.sensor import kernel
from lossworks.entries.losses.bands.pansharpening import local_correlation
from lossworks.entries.methods.rho_pnn import budgets, switched
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.metrics.cubes import ergas, spectral_angle
from lossworks_testing.training import run_training


def bands(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [2.0, -0.3, 1e3, -1e-3])
@pytest.mark.parametrize("offset", [0.0, 7.0])
def test_a_band_that_is_affine_in_the_pan_image_has_no_spatial_loss(factor, offset):
    pan = bands(1, 24, 24)

    correlation = local_correlation(factor * pan + offset, pan, 4)
    loss = create("pan-correlation")(factor * pan + offset, bands(1, 6, 6), pan=pan)

    torch.testing.assert_close(correlation, torch.full_like(correlation, np.sign(factor)), atol=1e-6, rtol=0)
    assert loss == pytest.approx(0.0, abs=1e-6)


def test_the_spatial_loss_of_a_constant_band_is_one_and_has_a_slope_that_is_finite():
    flat = torch.full((1, 12, 12), 0.5, dtype=torch.float64, requires_grad=True)

    loss = create("pan-correlation")(flat, bands(1, 6, 6), pan=bands(1, 12, 12))
    loss.backward()

    assert float(loss.detach()) == pytest.approx(1.0)
    assert flat.grad.isfinite().all()


def test_correlations_are_those_of_each_box():
    a, b = bands(1, 7, 6), bands(1, 7, 6, seed=1)

    found = local_correlation(a, b, 3)

    expected = np.corrcoef(a[0, 2:5, 1:4].flatten(), b[0, 2:5, 1:4].flatten())[0, 1]
    assert found.shape == (1, 5, 4)
    assert found[0, 2, 1] == pytest.approx(expected, abs=1e-6)


def test_the_switch_keeps_its_state_between_the_thresholds():
    now, seen = False, []
    for spectral in (0.7, 0.6, 0.58, 0.6, 0.66, 0.6):
        now = switched(now, spectral, 1.0, 0.65, 0.9)
        seen.append(now)

    assert seen == [False, False, True, True, False, False]


def test_bands_like_their_neighbour_get_few_steps():
    stream = np.random.default_rng(0)
    first, other = stream.normal(size=(2, 6, 6))
    cube = np.stack([first, first * 2 + 1, other, other])

    found = budgets(cube, 1000, 3.0)

    assert found.sum() <= 1000
    assert found[0] == found[1] == found[3] == pytest.approx(1000 / 4 / 4, abs=1)
    assert found[2] == pytest.approx(1000 / 4 / 4 * 13, abs=1)


def test_the_blur_has_the_gain_of_the_sensor_at_the_nyquist_frequency():
    weights = kernel(4, 0.3, torch.zeros(0, dtype=torch.float64))
    place = torch.arange(len(weights)) - len(weights) // 2

    gain = (weights * torch.cos(2 * np.pi * place / 8)).sum()

    assert float(gain) == pytest.approx(0.3, abs=1e-3)
    assert float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_interpolated_bands_pass_through_the_pixels_that_they_are_from(ratio):
    coarse = bands(2, 6, 5).numpy()

    sharp = interpolated(coarse, ratio)

    np.testing.assert_allclose(decimated(torch.from_numpy(sharp), ratio), coarse, atol=1e-9)


def test_a_band_that_the_sensor_sees_as_it_did_has_no_spectral_loss():
    sharp = bands(2, 48, 48)
    coarse = decimated(blurred(sharp, 4), 4)

    assert create("spectral-consistency")(sharp, coarse) == pytest.approx(0.0, abs=1e-12)
    assert create("spectral-consistency")(sharp + 0.25, coarse) == pytest.approx(0.25, abs=1e-9)


def test_errors_of_sharpened_cubes_in_closed_form():
    truth = torch.ones(3, 4, 4, dtype=torch.float64)

    assert ergas(truth * 1.1, truth, 4) == pytest.approx(100 / 4 * 0.1)
    assert spectral_angle(truth * 1.1, truth) == pytest.approx(0.0, abs=1e-9)
    turned = truth.clone()
    turned[0] = 0
    assert spectral_angle(turned, truth) == pytest.approx(np.degrees(np.arccos(2 / np.sqrt(6))))


def test_a_drawn_scene_is_the_same_again_and_coarser_by_its_ratio():
    first, second = (draw_scene(33, 5, 4, 0.01, 3) for _ in range(2))

    assert np.array_equal(first.bands, second.bands)
    assert first.bands.shape == (5, 8, 8)
    assert first.pan.shape == (32, 32)
    assert first.truth.shape == (5, 32, 32)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pan": np.ones((9, 8))}, r"pan \(9, 8\)"),
        ({"pan": np.ones((4, 4))}, "two or more"),
        ({"bands": np.ones((4, 4))}, r"\(C, h, w\)"),
        ({"bands": np.full((2, 4, 4), np.nan)}, r"bands holds NaN or Inf, first at \(0, 0, 0\)"),
        ({"truth": np.ones((2, 4, 4))}, r"truth \(2, 4, 4\) must be \(2, 8, 8\)"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, named):
    arrays = {"bands": np.ones((2, 4, 4)), "pan": np.ones((8, 8)), **change}

    with pytest.raises(UserError, match=named):
        cube_of(arrays, "a.npz")


def test_a_run_ends_when_all_bands_are_done_and_goes_on_where_it_stood(tmp_path):
    """Its last figures stand at the last step, too, where whoever compares runs looks for them."""
    values = {
        "task": "pansharpening",
        "steps": 60,
        "batch_size": 1,
        "workers": 1,
        "sharding": "none",
        "data": {"source": "scene:32", "bands": 3},
        "model": {"features": [4, 4]},
        "methods": [{"name": "rho-pnn", "eta": 1, "switching": "constant"}],
        "optimizer": {"lr": 0.001},
        "evaluation": {"every": 60},
        "checkpoint": {"every": 2},
        "tracking": {"model": False},
    }
    whole = run_training(values, None, str(tmp_path / "whole"))
    run_training(values, None, str(tmp_path / "parts"), stop_after=5)
    rest = run_training(values, None, str(tmp_path / "parts"))

    assert whole["status"] == "finished"
    assert whole["step"] < 60
    assert whole["rows"][-1][0] == 60
    assert whole["metrics"]["rho/bands_done"] == 3
    for name in ("rho/ergas", "rho/sam", "rho/spread", "eval/spectral"):
        assert rest["metrics"][name] == whole["metrics"][name]
    assert np.isfinite(whole["metrics"]["rho/ergas"])
