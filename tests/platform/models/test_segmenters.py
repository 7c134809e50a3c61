"""Models of dense prediction: features of every pixel of images of any size."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.models.segmentation import build_segmenter, load_segmenter, save_segmenter
from lossworks.models.segmentation.windows import blended, starts
from lossworks.specs.tasks.segmenter import SegmenterSpec

KINDS = ("unet", "predict-refine")


def small(kind, *, classes=3, channels=2, **more):
    spec = SegmenterSpec(kind=kind, levels=2, width=4, groups=2, **more)
    return build_segmenter(spec, channels=channels, classes=classes, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(1, 1), (1, 7), (9, 13), (16, 16)])
def test_logits_of_images_of_any_size(kind, sides):
    model = small(kind)
    images = torch.randn(2, 2, *sides)

    outputs = model.outputs(images)

    assert outputs.logits.shape == (2, *sides, 3)
    assert torch.equal(outputs.logits, model.logits(images))
    assert outputs.logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_the_others_of_its_batch(kind):
    model = small(kind).double()
    images = torch.randn(3, 2, 12, 10, dtype=torch.float64)

    together = model.logits(images)
    alone = torch.cat([model.logits(image) for image in images.split(1)])

    torch.testing.assert_close(together, alone, atol=1e-10, rtol=0)


def test_refined_logits_are_the_coarse_ones_plus_a_residual():
    model = small("predict-refine").double()
    images = torch.randn(2, 2, 12, 10, dtype=torch.float64)

    outputs = model.outputs(images)
    coarse = outputs.sides[0].logits
    refined = model.refiner(coarse.movedim(-1, 1))[0].movedim(1, -1)

    torch.testing.assert_close(outputs.logits, coarse + model.residual(refined), atol=1e-10, rtol=0)
    assert [tuple(side.hidden.shape[1:3]) for side in outputs.sides] == [(12, 10), (6, 5), (3, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_a_gradient_of_a_loss_that_reads_no_sides(kind):
    model = small(kind)

    model.outputs(torch.randn(1, 2, 8, 8)).logits.square().sum().backward()

    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_activations_computed_again_give_the_same_gradients():
    images = torch.randn(2, 2, 12, 10)
    slopes = []
    for again in (False, True):
        model = small("unet")
        if again:
            model.checkpoint_activations()
        model.logits(images).square().mean().backward()
        slopes.append([p.grad for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


@given(length=st.integers(1, 300), window=st.integers(1, 64))
def test_windows_cover_a_side_and_overlap(length, window):
    found = starts(length, window)

    assert found[0] == 0
    assert found[-1] + min(window, length) == length
    assert all(0 < after - before <= window for before, after in pairwise(found))


@settings(deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), window=st.integers(1, 16))
def test_blended_windows_of_a_pointwise_map_are_that_map(height, width, window):
    images = torch.randn(2, 3, height, width, dtype=torch.float64)

    found = blended(lambda part: part.movedim(1, -1) ** 2, images, window)

    torch.testing.assert_close(found, images.movedim(1, -1) ** 2)


def test_large_images_are_read_by_windows_in_evaluation_alone():
    model = small("unet", window=16)
    images = torch.randn(1, 2, 40, 24)
    whole = model.read(images).hidden

    assert torch.equal(model.outputs(images).hidden, whole)
    model.eval()
    assert not torch.equal(model.outputs(images).hidden, whole)
    logits = model.logits(images)
    assert torch.equal(model.classes_of(images), logits.argmax(-1))
    assert torch.equal(model.outputs(images[..., :16, :16]).hidden, model.read(images[..., :16, :16]).hidden)


def test_a_written_model_answers_as_before(tmp_path):
    model = small("predict-refine").eval()
    images = np.random.default_rng(0).normal(size=(2, 2, 9, 7)).astype(np.float32)
    how = {"channels": 2, "names": ("a", "b", "c"), "standardisation": None, "provenance": {}}

    save_segmenter(
        tmp_path / "m",
        spec=SegmenterSpec(kind="predict-refine", levels=2, width=4, groups=2),
        state=model.state_dict(),
        **how,
    )
    found = load_segmenter(tmp_path / "m")

    expected = model.logits(torch.from_numpy(images)).softmax(-1)
    np.testing.assert_allclose(found.probabilities(images), expected.detach(), atol=1e-6)
    assert found.names == ("a", "b", "c")
    with pytest.raises(UserError, match=r"\(N, 2, height, width\)"):
        found.masks(images[:, :1])


@pytest.mark.parametrize(
    ("values", "named"), [({"width": 6, "groups": 4}, "width=6"), ({"levels": 5, "window": 16}, "window=16")]
)
def test_sizes_that_do_not_fit_are_refused_by_name(values, named):
    with pytest.raises(UserError, match=named):
        SegmenterSpec.parse(values)
