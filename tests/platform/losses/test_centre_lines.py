"""Soft-clDice and Skeleton Recall: skeletons, exact values, and other implementations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from lossworks.entries.losses.maps.cldice import soft_skeleton
from lossworks.entries.losses.maps.skeleton_recall import thinned, tubes
from lossworks.losses import create
from lossworks.metrics.betti_numbers import betti_numbers

small = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda shape: arrays(np.bool_, shape))
CROSS = ndimage.generate_binary_structure(2, 1)


def sure(mask):
    """Return logits (1, 2, H, W) whose probabilities are exactly those of a mask of 0 and 1."""
    z = torch.as_tensor(mask, dtype=torch.float64) * 2e4 - 1e4
    return torch.stack((torch.zeros_like(z), z))[None]


def bar():
    """Return the bar of the fact sheet and the same without a column."""
    mask = np.zeros((32, 32))
    mask[14:17, 4:28] = 1
    cut = mask.copy()
    cut[:, 15] = 0
    return mask, cut


def plain_skeleton(image, iterations):
    """Return the soft skeleton by scipy's filters."""

    def eroded(x):
        return ndimage.minimum_filter(x, footprint=CROSS, mode="constant", cval=np.inf)

    def opened(x):
        return ndimage.maximum_filter(eroded(x), size=3, mode="constant", cval=-np.inf)

    skeleton = np.maximum(image - opened(image), 0)
    for _ in range(iterations):
        image = eroded(image)
        rest = np.maximum(image - opened(image), 0)
        skeleton = skeleton + np.maximum(rest - skeleton * rest, 0)
    return skeleton


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_soft_skeleton_is_that_of_the_paper(iterations):
    """With and without a gradient, by other filters; and within 0 and 1."""
    images = torch.rand(2, 3, 9, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    found = soft_skeleton(images, iterations)

    expected = [[plain_skeleton(one, iterations) for one in image] for image in images.numpy()]
    np.testing.assert_allclose(found.numpy(), expected)
    assert torch.equal(soft_skeleton(images.clone().requires_grad_(), iterations).detach(), found)
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_bar_of_the_fact_sheet():
    """Σ S_P = 19, Σ S_T = 22, precision 1, sensitivity 22/23, so 0.02222 of clDice, and Dice 0.97872."""
    mask, cut = bar()
    logits, targets = sure(cut), torch.from_numpy(mask).long()[None]
    skeletons = [soft_skeleton(torch.from_numpy(one)[None, None], 3).sum().item() for one in (cut, mask)]

    lines = create("cldice", alpha=1.0)(logits, targets).item()
    overlap = create("cldice", alpha=0.0, background=False)(logits, targets).item()
    both = create("cldice", background=False)(logits, targets).item()

    assert skeletons == [19, 22]
    assert lines == pytest.approx(1 - 2 * (22 / 23) / (1 + 22 / 23))
    assert lines == pytest.approx(0.02222, abs=5e-6)
    assert 1 - overlap == pytest.approx(0.97872, abs=5e-6)
    assert both == pytest.approx((lines + overlap) / 2)
    assert create("cldice")(sure(mask), targets).item() == pytest.approx(0, abs=1e-9)


def test_iterations_must_reach_the_middle():
    """A square of 16 by 16 has no soft skeleton up to five iterations, and four pixels with seven."""
    square = torch.zeros(1, 1, 24, 24, dtype=torch.float64)
    square[..., 4:20, 4:20] = 1

    assert [soft_skeleton(square, k).sum().item() for k in (3, 5, 7)] == [0, 0, 4]


def test_the_loss_of_centre_lines_is_that_of_each_image():
    """Precision and sensitivity of each class of the foreground, in plain numbers."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 3, 9, 9, generator=g).double(), torch.randint(0, 3, (2, 9, 9), generator=g)
    p = z.softmax(1).numpy()

    found = create("cldice", alpha=1.0, iterations=2, reduction="none")(z, y)

    for image in range(2):
        losses = []
        for k in (1, 2):
            maps = p[image, k], (y[image] == k).double().numpy()
            lines = [plain_skeleton(one, 2) for one in maps]
            precision = ((lines[0] * maps[1]).sum() + 1) / (lines[0].sum() + 1)
            sensitivity = ((lines[1] * maps[0]).sum() + 1) / (lines[1].sum() + 1)
            losses.append(1 - 2 * precision * sensitivity / (precision + sensitivity))
        assert found[image].item() == pytest.approx(np.mean(losses))


def plainly_thinned(mask):
    """Return Zhang and Suen's thinning pixel by pixel."""
    image = np.pad(mask, 1).astype(int)
    places = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    while True:
        before = image.copy()
        for triples in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            gone = []
            for i, j in zip(*np.nonzero(image), strict=True):
                n = [image[i + a, j + b] for a, b in places]
                runs = sum(one == 0 and other == 1 for one, other in zip(n, n[1:] + n[:1], strict=True))
                if 2 <= sum(n) <= 6 and runs == 1 and not any(all(n[k] for k in t) for t in triples):
                    gone.append((i, j))
            for place in gone:
                image[place] = 0
        if (image == before).all():
            return image[1:-1, 1:-1] == 1


@given(small)
@settings(max_examples=60, deadline=None)
def test_masks_are_thinned_as_the_paper_says(mask):
    """Image by image and pixel by pixel; lines stay within the mask and don't fall apart."""
    found = thinned(np.stack((mask, mask[::-1])))

    assert (found[0] == plainly_thinned(mask)).all()
    assert (found[1] == plainly_thinned(mask[::-1])).all()
    assert (found[0] <= mask).all()
    lines, whole = betti_numbers(found[0]), betti_numbers(mask)
    assert lines[0] <= whole[0]  # objects of two by two pixels vanish
    assert lines[1] == whole[1]


@given(small)
@settings(max_examples=60, deadline=None)
def test_every_object_has_a_tube(mask):
    """Those of two by two pixels, too, which thinning takes away; each lies within its object."""
    found = tubes(np.stack((mask, np.ones_like(mask), mask)))
    objects, count = ndimage.label(mask, np.ones((3, 3)))

    assert set(objects[found[0]]) == set(range(1, count + 1))
    assert (found[0] == found[2]).all()


def test_lines_are_those_of_scikit_image():
    """But for corners, which it thins further, and ends: as many holes, and nearly the same tubes."""
    morphology = pytest.importorskip("skimage.morphology")
    noise = np.random.default_rng(0).standard_normal((3, 60, 70))
    masks = np.stack([ndimage.gaussian_filter(one, width + 1) > 0 for width, one in enumerate(noise)])

    for mask, lines, tube in zip(masks, thinned(masks), tubes(masks), strict=True):
        theirs = morphology.skeletonize(mask)
        around = ndimage.binary_dilation(theirs, CROSS, 2) & mask
        assert betti_numbers(lines)[1] == betti_numbers(theirs)[1] == betti_numbers(mask)[1]
        assert (tube & around).sum() > 0.8 * (tube | around).sum()


def test_the_tube_of_a_bar():
    """Two steps around its middle line, and within it."""
    mask, _ = bar()
    line, tube = thinned(mask[None] == 1)[0], tubes(mask[None] == 1)[0]

    assert line.sum(0).max() == 1
    assert line.sum() >= 20
    assert (tube == (ndimage.binary_dilation(line, CROSS, 2) & (mask == 1))).all()


def test_skeleton_recall_in_plain_numbers():
    """Cross-entropy, the recall of each class's part of the tubes, and Dice where it is asked for."""
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 3, 20, 20, generator=g).double(), torch.zeros(2, 20, 20, dtype=torch.int64)
    y[0, 3:8, 2:18], y[0, 3:18, 10:13], y[1, 4:7, 4:16] = 1, 2, 1
    p, e = z.softmax(1), 1e-5
    tube = torch.from_numpy(tubes((y > 0).numpy()))

    found = create("skeleton-recall", recall_weight=0.7, reduction="none")(z, y)
    beside = create("skeleton-recall", recall_weight=0.7, dice_weight=0.5, reduction="none")(z, y)

    nats = torch.nn.functional.cross_entropy(z, y, reduction="none").mean((1, 2))
    for image in range(2):
        recalls = []
        for k in (1, 2):
            part = (y[image] == k) & tube[image]
            recalls.append(((p[image, k] * part).sum() + e) / (part.sum() + e))
        expected = nats[image] + 0.7 * (1 - sum(recalls) / 2)
        torch.testing.assert_close(found[image], expected)
    torch.testing.assert_close(beside - found, 0.5 * create("map-dice", reduction="none")(z, y))


def test_recall_alone_is_best_where_all_is_foreground():
    """1 for p = 1 everywhere, which is why it never stands alone."""
    mask, _ = bar()
    targets = torch.from_numpy(mask).long()[None]
    everything = sure(np.ones((32, 32)))
    alone = [create("skeleton-recall", recall_weight=w)(everything, targets).item() for w in (1.0, 2.0)]

    assert alone[0] == pytest.approx(alone[1])
    assert alone[0] > 1000  # the cross-entropy of the background
    assert create("skeleton-recall")(sure(mask), targets).item() == pytest.approx(0, abs=1e-9)


def test_the_soft_skeleton_s_gradient_is_that_of_pooling():
    """Where no two values are equal; and of finite differences."""

    def pooled(x, iterations):
        def eroded(x):
            return -torch.maximum(F.max_pool2d(-x, (3, 1), 1, (1, 0)), F.max_pool2d(-x, (1, 3), 1, (0, 1)))

        def rest(x):
            return F.relu(x - F.max_pool2d(eroded(x), 3, 1, 1))

        found = rest(x)
        for _ in range(iterations):
            x = eroded(x)
            found = found + F.relu(rest(x) - found * rest(x))
        return found

    x = torch.rand(1, 2, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(
        *(torch.autograd.grad((f(x, 3) * upstream).sum(), x) for f in (soft_skeleton, pooled))
    )
    assert torch.autograd.gradcheck(lambda x: soft_skeleton(x, 2), (x,), fast_mode=True)
