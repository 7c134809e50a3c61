"""Patches and changes by chance: image and mask stay together, and a visit decides what is drawn."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.data import VisitOrder
from lossworks.data.images.augmentation import changed, levels, with_hue
from lossworks.data.images.masked_images import MaskedImages, Visiting
from lossworks.data.images.masks import load_masks
from lossworks.errors import UserError
from lossworks.specs import AugmentationSpec, MasksSpec

SIZES = st.integers(2, 40)


def numbered(height, width):
    """Return an image that is its mask, with the number of every pixel."""
    mask = np.arange(height * width).reshape(height, width)
    return mask[None].astype(np.float32), mask.astype(np.int16)


@settings(deadline=None)
@given(height=SIZES, width=SIZES, patch=st.integers(0, 50), seed=st.integers(0, 99), turned=st.booleans())
def test_an_image_that_is_its_mask_stays_it(height, width, patch, seed, turned):
    """Patches anywhere, turned and mirrored; all pixels come once, and neighbours stay neighbours."""
    image, mask = numbered(height, width)
    spec = AugmentationSpec(flip=turned, turn=turned)
    found, own = changed(image, mask, spec, patch, np.random.default_rng(seed))
    counts = own != -100

    assert own.shape == ((patch, patch) if patch else (height, width))
    assert found.shape == (1, *own.shape)
    assert (found[0][counts] == own[counts]).all()
    shown = min(patch or height, height) * min(patch or width, width)
    assert len(np.unique(own[counts])) == counts.sum() == shown
    for one, other in ((own[1:], own[:-1]), (own[:, 1:], own[:, :-1])):
        both = (one != -100) & (other != -100)
        down, right = (
            np.abs(part(one) - part(other)) for part in (lambda at: at // width, lambda at: at % width)
        )
        assert ((down + right)[both] == 1).all()


@settings(deadline=None)
@given(height=SIZES, width=SIZES, patch=st.integers(0, 50), seed=st.integers(0, 99))
def test_what_is_magnified_shows_the_same_place_in_image_and_mask(height, width, patch, seed):
    """Of an image whose levels are places, between the middles of pixels levels are places as well."""
    down, right = np.mgrid[:height, :width].astype(np.float32)
    mask = (100 * down + right).astype(np.int16)
    stream = np.random.default_rng(seed)
    found, own = changed(np.stack((down, right)), mask, AugmentationSpec(scale=2.0), patch, stream)
    counts = own != -100

    assert counts.any()
    nearest = np.stack((own // 100, own % 100))
    assert (np.abs(found - nearest)[:, counts] <= 0.5 + 1e-3).all()


def test_whole_images_come_as_they_are_unless_something_is_asked_for():
    image, mask = numbered(7, 9)
    found, own = changed(image, mask, AugmentationSpec(), 0, np.random.default_rng(0))
    assert (found == image).all()
    assert (own == mask).all()


def test_all_turns_and_mirrors_come():
    """The eight of a square, about equally often; of what is no square the four that keep its shape."""
    for size, count in (((5, 5), 8), ((4, 5), 4)):
        image, mask = numbered(*size)
        spec = AugmentationSpec(flip=True, turn=True)
        seen = [
            changed(image, mask, spec, 0, np.random.default_rng(seed))[1].tobytes() for seed in range(400)
        ]
        counts = [seen.count(one) for one in set(seen)]
        assert len(counts) == count
        assert min(counts) > 400 / count / 2


def test_patches_come_from_everywhere():
    image, mask = numbered(9, 6)
    firsts = {
        int(changed(image, mask, AugmentationSpec(), 4, np.random.default_rng(seed))[1][0, 0])
        for seed in range(400)
    }
    assert firsts == set(mask[:6, :3].ravel().tolist())


def test_brightness_and_contrast_are_what_they_say():
    image = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    mask = np.zeros((8, 8), dtype=np.int16)
    shifts, factors = [], []
    for seed in range(200):
        bright, _ = changed(image, mask, AugmentationSpec(brightness=0.3), 0, np.random.default_rng(seed))
        shift = bright - image
        assert np.ptp(shift) < 1e-6
        shifts.append(shift.mean())
        sharp, _ = changed(image, mask, AugmentationSpec(contrast=2.0), 0, np.random.default_rng(seed))
        assert sharp.mean((1, 2)) == pytest.approx(image.mean((1, 2)), abs=1e-6)
        factors.append(sharp.std() / image.std())
    assert -0.3 <= min(shifts) < -0.27
    assert 0.27 < max(shifts) <= 0.3
    assert 0.5 - 1e-6 <= min(factors) < 0.52
    assert 1.93 < max(factors) <= 2 + 1e-6


@given(
    pixel=st.tuples(*[st.floats(0, 1, width=32)] * 3),
    hue=st.floats(0, 0.999),
    saturation=st.floats(0, 0.5),
    value=st.floats(0, 0.5),
)
def test_a_hue_is_that_of_the_standard_library(pixel, hue, saturation, value):
    """Saturation and value of colorsys, with what is added, at most 1; black has no saturation."""
    image = np.array(pixel, dtype=np.float32).reshape(3, 1, 1)
    _, own_saturation, own_value = colorsys.rgb_to_hsv(*map(float, image.ravel()))
    expected = colorsys.hsv_to_rgb(hue, min(1, own_saturation + saturation), min(1, own_value + value))

    assert with_hue(image, hue, saturation, value).ravel() == pytest.approx(expected, abs=1e-5)


def test_one_image_in_two_gets_a_random_hue():
    image = np.random.default_rng(0).random((3, 8, 8), dtype=np.float32)
    mask = np.zeros((8, 8), dtype=np.int16)
    same = 0
    for seed in range(200):
        found, _ = changed(image, mask, AugmentationSpec(random_hue=True), 0, np.random.default_rng(seed))
        same += (found == image).all()
        if (found != image).any():
            hues = [colorsys.rgb_to_hsv(*map(float, pixel)) for pixel in found.reshape(3, -1).T]
            around = np.exp(2j * np.pi * np.array([hue for hue, strength, _ in hues if strength > 0.01]))
            assert np.abs(around - around[0]).max() < 1e-2
    assert 70 < same < 130


def test_levels_of_whole_numbers_go_from_0_to_1():
    assert levels(np.array([0, 51, 255], np.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert levels(np.array([0, 13107, 65535], np.uint16)).tolist() == pytest.approx([0, 0.2, 1])
    assert levels(np.array([-3.5, 700])).tolist() == [-3.5, 700]


def data(**values):
    augment = {
        "flip": True,
        "turn": True,
        "scale": 1.5,
        "contrast": 1.3,
        "brightness": 0.1,
        "random_hue": True,
    }
    return load_masks(MasksSpec.parse({"source": "shapes:12", "side": 32, "augment": augment, **values}), 0)


def test_a_visit_decides_what_is_drawn_whoever_asks_and_when():
    """In whatever batches, orders and processes; another epoch of the same row differs."""
    train, again = data(patch=24).train, data(patch=24).train
    order = VisitOrder(len(train), 4, 0)
    visits = np.concatenate([order.rows(position, 0, 1) for position in range(0, 36, 4)])
    whole = train.batch(visits)
    np.random.default_rng(3).shuffle(visits)
    for visit in visits:
        one = again.batch(np.array([visit]))
        at = np.flatnonzero(np.concatenate([order.rows(p, 0, 1) for p in range(0, 36, 4)]) == visit)[0]
        assert torch.equal(one["inputs"][0], whole["inputs"][at])
        assert torch.equal(one["targets"][0], whole["targets"][at])
    epochs = train.batch(np.array([2, 2 + len(train)]))["inputs"]
    assert not torch.equal(epochs[0], epochs[1])
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    train.batch(np.arange(3))
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])


def test_held_out_images_are_never_changed():
    assert torch.equal(
        data(standardise=False).held_out.batch(np.arange(3))["inputs"],
        torch.from_numpy(np.stack(data().held_out.images)),
    )


def test_images_of_several_sizes_are_padded_where_they_are_held_out_and_need_patches_in_training(tmp_path):
    stream = np.random.default_rng(0)
    sizes = [(20, 30), (25, 18), (40, 9), (16, 16), (12, 50), (33, 33)]
    images = [stream.random((3, *size), dtype=np.float32) for size in sizes]
    masks = [stream.integers(0, 2, size).astype(np.int16) for size in sizes]
    batch = MaskedImages(images, masks, "abcdef").batch(np.arange(6))

    assert batch["inputs"].shape == (6, 3, 40, 50)
    for at, (height, width) in enumerate(sizes):
        assert (batch["inputs"][at, :, :height, :width].numpy() == images[at]).all()
        assert (batch["targets"][at, :height, :width].numpy() == masks[at]).all()
        assert (batch["targets"][at] != -100).sum() == height * width
        assert (
            batch["inputs"][at, :, height:, width - 1]
            == batch["inputs"][at, :, height - 1, width - 1][:, None]
        ).all()
    patches = MaskedImages(images, masks, "abcdef", None, Visiting(AugmentationSpec(), 24, 0))
    assert patches.batch(np.arange(6))["inputs"].shape == (6, 3, 24, 24)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for at in range(6):
            np.save(tmp_path / part / f"{at}.npy", images[at] if part == "images" else masks[at])
    source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=r"patch=0: training takes whole images, and these differ"):
        load_masks(MasksSpec(source=source), 0)
    loaded = load_masks(MasksSpec(source=source, patch=16), 0)
    assert loaded.train.batch(np.arange(4))["targets"].shape == (4, 16, 16)
    whole = torch.cat([torch.from_numpy(image).double().flatten(1) for image in loaded.train.images], 1)
    assert loaded.standardisation.mean == pytest.approx(whole.mean(1).numpy(), abs=1e-6)
    assert loaded.standardisation.deviation == pytest.approx(whole.std(1, correction=0).numpy(), abs=1e-6)


def test_a_random_hue_needs_three_colours(tmp_path):
    x, y = np.random.default_rng(0).normal(size=(4, 3, 8, 8)), np.arange(256).reshape(4, 8, 8) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    spec = MasksSpec.parse({"source": f"npz:{tmp_path}/a.npz", "augment": {"random_hue": True}})
    with pytest.raises(UserError, match=r"hue=true: is for images of three .* from 0 to 1, and these have 3"):
        load_masks(spec, 0)


def test_a_constant_channel_is_only_shifted(tmp_path):
    x = np.full((4, 1, 8, 8), 0.1)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(256).reshape(4, 8, 8) % 2)
    found = load_masks(MasksSpec(source=f"npz:{tmp_path}/a.npz"), 0)
    assert found.standardisation.deviation.tolist() == [1]
    assert found.train.batch(np.arange(3))["inputs"].abs().max() < 1e-6
