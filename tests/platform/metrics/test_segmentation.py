"""Yardsticks of masks: overlap, boundaries and topology by hand, sums that add, and empty masks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.metrics.classification import class_sums
from lossworks.metrics.segmentation import MapSums, map_sums

IGNORE = -100


def maps(*rows):
    """Return an image of digits, ``.`` where it is ignored, shape (1, H, W)."""
    return torch.tensor([[[IGNORE if c == "." else int(c) for c in row] for row in rows]])


def random_maps(images=3, classes=3, size=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    predicted, targets = (torch.randint(0, classes, (images, size, size), generator=g) for _ in range(2))
    targets[torch.rand(targets.shape, generator=g) < 0.2] = IGNORE
    return predicted, targets


def test_overlap_by_hand():
    """Of two classes over two images: pixels are counted over all images, ignored ones are not."""
    predicted = torch.cat((maps("0112", "0112"), maps("0000", "1100")))
    targets = torch.cat((maps("0111", ".112"), maps("0000", "0000")))

    sums = map_sums(predicted, targets, 3)
    dice, iou = (sums.by_class()[name] for name in ("dice", "iou"))

    assert dice[1:] == pytest.approx([2 * 4 / (6 + 5), 2 * 1 / (2 + 1)])
    assert iou[1:] == pytest.approx([4 / 7, 1 / 2])
    assert sums.metrics()["dice"] == pytest.approx(sum(dice[1:]) / 2)
    assert sums.metrics()["iou"] == pytest.approx(sum(iou[1:]) / 2)


def test_dice_is_the_f1_of_the_pixels():
    """As the sums of classes have it, where every class is there."""
    predicted, targets = random_maps()
    logits = torch.nn.functional.one_hot(predicted, 3).double()

    f1 = class_sums(logits.flatten(0, 2), targets.flatten()).metrics()["macro_f1"]

    assert sum(map_sums(predicted, targets, 3).by_class()["dice"]) / 3 == pytest.approx(f1)


@pytest.mark.parametrize(("shift", "tolerance", "expected"), [(0, 0, 1), (1, 0, 0), (1, 1, 1), (3, 2, 0)])
def test_boundaries_count_within_the_tolerance(shift, tolerance, expected):
    """A line of one pixel's width, moved by some pixels, is all boundary."""
    predicted, targets = torch.zeros(2, 1, 12, 12, dtype=torch.int64)
    targets[0, :, 4] = 1
    predicted[0, :, 4 + shift] = 1

    found = map_sums(predicted, targets, 2, tolerance=tolerance).metrics()

    assert found["boundary_f"] == expected
    assert found["dice"] == (shift == 0)


def test_boundary_f_is_the_harmonic_mean_of_precision_and_recall():
    """Half of the predicted boundary lies on the actual one, which is all found."""
    targets = maps("000000", "011110", "000000", "000000", "000000")
    predicted = maps("000000", "011110", "000000", "011110", "000000")

    found = map_sums(predicted, targets, 2, tolerance=0).metrics()["boundary_f"]

    precision, recall = 4 / 8, 1.0
    assert found == pytest.approx(2 * precision * recall / (precision + recall))


def test_neither_the_edge_of_the_image_nor_ignored_pixels_make_a_boundary():
    """What lies there isn't known."""
    predicted, targets = torch.ones(2, 1, 6, 6, dtype=torch.int64)
    targets[0, 2:4, 2:4] = IGNORE
    predicted[0, 2, 2] = 0

    assert map_sums(predicted, targets, 2).values[6 + 7 + 3 :].sum() == 0


def test_topology_by_hand():
    """A ring and a square against a cut ring: a component less, a hole less; the mean over two images."""
    targets = maps("000000000", "011100000", "010100110", "011100110", "000000000")
    predicted = maps("000000000", "010100000", "010100000", "011100000", "000000000")

    sums = map_sums(torch.cat((predicted, targets)), torch.cat((targets, targets)), 2, matching=True)

    names = ("b0_error", "b1_error", "b0_matching_error", "b1_matching_error")
    assert [sums.metrics()[name] for name in names] == [0.5] * 4
    assert "b0_matching_error" not in map_sums(predicted, targets, 2).metrics()


def test_betti_numbers_are_means_over_classes():
    """A component too many in one of two classes is half an error, in the connectivity that is asked for."""
    targets, predicted = maps("1001", "0000", "0220"), maps("1000", "0100", "0220")

    assert map_sums(predicted, targets, 3).metrics()["b0_error"] == 0.5
    assert map_sums(predicted, targets, 3, connectivity=4).metrics()["b0_error"] == 0


@given(st.integers(0, 2**31), st.booleans())
@settings(max_examples=8, deadline=None)
def test_sums_add_over_images(seed, matching):
    """One by one they give what they give together; the same masks have no errors."""
    predicted, targets = random_maps(seed=seed, size=5)

    whole = map_sums(predicted, targets, 3, matching=matching)
    parts = [map_sums(predicted[i : i + 1], targets[i : i + 1], 3, matching=matching) for i in range(3)]
    same = map_sums(targets.clamp(min=0), targets, 3, matching=True).metrics()

    torch.testing.assert_close(sum(part.values for part in parts), whole.values)
    assert {name: value for name, value in same.items() if not name.endswith("error")} == {
        "dice": 1,
        "iou": 1,
        "boundary_f": 1,
    }
    assert all(value == 0 for name, value in same.items() if name.endswith("error"))


def test_what_an_ignored_pixel_holds_changes_nothing():
    """Nor an image of nothing else."""
    predicted, targets = random_maps()
    other = torch.where(targets == IGNORE, 2 - predicted, predicted)
    nothing = torch.full_like(targets, IGNORE)

    expected = map_sums(predicted, targets, 3, matching=True).values

    assert torch.equal(map_sums(other, targets, 3, matching=True).values, expected)
    both = map_sums(torch.cat((predicted, predicted)), torch.cat((targets, nothing)), 3, matching=True)
    assert torch.equal(both.values, expected)


def test_empty_masks_have_no_nan():
    """Nothing there and nothing predicted is right; nothing there and something predicted is wrong."""
    empty = torch.zeros(1, 4, 4, dtype=torch.int64)
    full = torch.ones_like(empty)

    right = map_sums(empty, empty, 3, matching=True).metrics()
    wrong = map_sums(full, empty, 3, matching=True).metrics()
    missed = map_sums(empty, full, 3, matching=True).metrics()
    none = map_sums(empty[:0], empty[:0], 3).metrics()

    assert [right[name] for name in ("dice", "iou", "boundary_f", "b0_error", "b1_error")] == [1, 1, 1, 0, 0]
    for found in (wrong, missed):
        assert [found[name] for name in ("dice", "iou", "b0_error")] == [0, 0, 0.5]
    assert all(math.isfinite(value) for found in (right, wrong, missed, none) for value in found.values())
    assert math.isnan(map_sums(empty, empty, 3).by_class()["dice"][2])


def test_what_is_refused():
    """Shapes that differ, and one class only."""
    with pytest.raises(UserError, match=r"predicted .1, 4, 4. and targets .1, 4, 5. must be .B, H, W. both"):
        map_sums(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5), 2)
    with pytest.raises(UserError, match="classes=1 must be 2 at least, the background among them"):
        map_sums(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), 1)


def test_the_vector_goes_over_ranks_as_it_is():
    """Sums are made of nothing but their numbers."""
    sums = map_sums(*random_maps(), 3)

    assert MapSums(sums.values.clone()).metrics() == sums.metrics()
    assert sums.values.dtype == torch.float64
    assert sums.values.shape == (6 + 7 * 3,)
