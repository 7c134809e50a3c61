"""Images with a class for each pixel: what is drawn, and what training and evaluation get of it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.data.images.drawings.drawn import draw_masked
from lossworks.data.images.masks import load_masks
from lossworks.errors import UserError
from lossworks.specs import MasksSpec

KINDS = {"walls": 2, "vessels": 2, "shapes": 5, "voices": 2}


def load(seed=0, **values):
    return load_masks(MasksSpec.parse({"source": "walls:8", "side": 48, **values}), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_images_are_a_function_of_the_seed(kind):
    """The same bits again, others for another seed and number; shapes, types and ranges as documented."""
    image, mask = draw_masked(kind, 3, 64, 0)
    again = draw_masked(kind, 3, 64, 0)

    assert image.shape == (1 if kind == "voices" else 3, 64, 64)
    assert (image.dtype, mask.dtype) == (np.float32, np.int64)
    assert image.min() >= 0
    assert image.max() <= 1
    assert set(np.unique(mask)) <= set(range(KINDS[kind]))
    assert (again[0] == image).all()
    assert (again[1] == mask).all()
    for number, seed in ((4, 0), (3, 1)):
        other = draw_masked(kind, number, 64, seed)
        assert (other[0] != image).any()
        assert (other[1] != mask).any()


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    side=st.integers(32, 130),
    number=st.integers(0, 10**6),
    domain=st.sampled_from(["source", "target"]),
    labels=st.sampled_from(["accurate", "noisy", "weak"]),
)
def test_images_of_any_side_and_number_can_be_drawn(kind, side, number, domain, labels):
    image, mask = draw_masked(kind, number, side, 0, domain=domain, labels=labels)

    assert image.shape[1:] == mask.shape == (side, side)
    assert np.isfinite(image).all()
    assert (image.min() >= 0) & (image.max() <= 1)
    assert set(np.unique(mask)) <= set(range(KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_domains_differ_in_looks_alone_and_labels_in_masks_alone(kind):
    image, mask = draw_masked(kind, 1, 64, 0)
    target = draw_masked(kind, 1, 64, 0, domain="target")
    noisy = draw_masked(kind, 1, 64, 0, labels="noisy")
    weak = draw_masked(kind, 1, 64, 0, labels="weak")

    assert (target[1] == mask).all()
    assert np.abs(target[0] - image).mean() > 0.02
    for other in (noisy, weak):
        assert (other[0] == image).all()
        assert 0 < (other[1] != mask).mean() < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_masks_say_where_things_are_in_the_image(kind):
    """Levels differ most across a mask's edges, and less where the mask is moved by two pixels."""
    moves = [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)]
    found = np.zeros(len(moves))
    for number in range(10):
        image, mask = draw_masked(kind, number, 96, 0)
        steps = np.abs(np.diff(image, axis=2)).mean(0)[4:-4, 4:-4]
        edges = mask[:, 1:] != mask[:, :-1]
        found += [steps[np.roll(edges, move, (0, 1))[4:-4, 4:-4]].mean() for move in moves]

    assert found[0] > 1.05 * found[1:].max()


def test_held_out_masks_are_accurate_whatever_the_labels():
    """And the same images are held out; out of domain they look otherwise and have the same masks."""
    accurate = load()
    for values in ({"labels": "noisy"}, {"labels": "weak"}, {"held_out_domain": "target"}):
        other = load(**values)
        assert other.held_out.keys == accurate.held_out.keys
        assert all((a == b).all() for a, b in zip(other.held_out.masks, accurate.held_out.masks, strict=True))
        same = all((a == b).all() for a, b in zip(other.train.masks, accurate.train.masks, strict=True))
        assert same == ("labels" not in values)
    assert all((a != b).any() for a, b in zip(other.held_out.images, accurate.held_out.images, strict=True))


def test_batches_have_the_types_that_tasks_take():
    data = load(held_out_fraction=0.5)
    batch = data.train.batch(np.arange(3))

    assert len(data.train) == len(data.held_out) == 4
    assert (batch["inputs"].shape, batch["inputs"].dtype) == ((3, 3, 48, 48), torch.float32)
    assert (batch["targets"].shape, batch["targets"].dtype) == ((3, 48, 48), torch.int64)
    whole = data.train.batch(np.arange(4))["inputs"].double()
    assert whole.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert whole.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)


def test_what_a_model_has_learnt_holds():
    """Its scale, and its classes' numbers; images of other channels or classes are refused."""
    own = load()
    learnt = own.learnt.of("run 7")
    other = load_masks(MasksSpec(source="walls:8", side=48, domain="target"), 1, learnt)

    assert other.standardisation.plain() == own.standardisation.plain()
    assert own.learnt.facts["classes"] == ["brick", "mortar"]
    assert own.learnt.facts["channels"] == 3
    with pytest.raises(UserError, match="'background' is none of the classes of run 7, which are brick"):
        load_masks(MasksSpec(source="vessels:8", side=48), 0, learnt)
    voices = load(source="voices:8").learnt.of("run 8")
    with pytest.raises(UserError, match="images have 3 channels; those of run 8 have 1"):
        load_masks(MasksSpec(source="walls:8", side=48, classes=None), 0, replaced(voices, learnt))


def replaced(learnt, other):
    """Return what was learnt of one with the classes of another."""
    facts = {**learnt.facts, "classes": other.facts["classes"]}
    return type(learnt)(facts, source=learnt.source)


def test_classes_are_kept_numbered_and_joined():
    """Pixels of other classes count for nothing; a foreground joins what is left but the first."""
    whole = load(source="shapes:8")
    kept = load(source="shapes:8", classes=["background", "star"])
    joined = load(source="shapes:8", foreground=True)

    for all_, two, one in zip(whole.train.masks, kept.train.masks, joined.train.masks, strict=True):
        assert (two == np.select([all_ == 0, all_ == 4], [0, 1], -100)).all()
        assert (one == (all_ > 0)).all()
    assert kept.names == ("background", "star")
    assert joined.names == ("background", "foreground")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "walls"}, r"source='walls': must be one of walls:N, .* with N from 4 to 100000"),
        ({"source": "walls:3"}, "with N from 4"),
        ({"source": "clouds:30"}, "must be one of"),
        ({"source": "folder:"}, "must be one of"),
        ({"side": 16}, "side=16"),
        ({"source": "folder:a", "labels": "weak"}, "labels=weak is for drawn images; source=folder:a has"),
        ({"source": "npz:a", "domain": "target"}, "domain=target is for drawn images"),
        ({"source": "npz:a", "held_out_domain": "source"}, "held_out_domain=source is for drawn images"),
        ({"source": "voices:8", "augment": {"random_hue": True}}, "voices:8 has one channel"),
        ({"classes": ["brick", "gold"]}, "data.classes: gold is no class; there are brick, mortar"),
        ({"classes": ["brick", "brick"]}, "names a class twice"),
        ({"patch": 64}, "data.patch=64: the largest image has 48 pixels a side"),
    ],
)
def test_what_is_no_such_thing_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        load(**values)


def test_classes_that_are_left_out_stay_so_for_a_model_that_learnt_the_others():
    spec = MasksSpec(source="shapes:8", side=48, classes=["background", "disc", "square"])
    first = load_masks(spec, 0)

    again = load_masks(spec, 0, first.learnt)

    for one, other in zip(first.train.masks, again.train.masks, strict=True):
        assert np.array_equal(one, other)
    assert any((mask == -100).any() for mask in again.train.masks)
