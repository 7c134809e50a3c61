"""Betti numbers and Betti matching: exact values, bounds, and the plain reduction of boundary matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lossworks.benchmarks.segmentation.boundary_matrices import plain_matching
from lossworks.errors import UserError
from lossworks.metrics import betti_matching_error
from lossworks.metrics.betti_matching import betti_matching, framed
from lossworks.metrics.betti_numbers import betti_numbers

masks = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda shape: st.tuples(*[arrays(np.bool_, shape)] * 2)
)
both = st.sampled_from([4, 8])


def blank():
    return np.zeros((10, 16))


def ring(row=0, column=0, size=5):
    """Return a ring of one pixel's width in the blank image."""
    image = blank()
    image[row : row + size, column : column + size] = 1
    image[row + 1 : row + size - 1, column + 1 : column + size - 1] = 0
    return image


def square(row, column):
    image = blank()
    image[row : row + 3, column : column + 3] = 1
    return image


def loss_of(first, second):
    """Return the loss of the matching in plain numbers."""
    found = betti_matching(first, second)
    p, g = first.reshape(-1), second.reshape(-1)
    total = 2 * (p[found.essential[0]] - g[found.essential[1]]) ** 2
    for bars in found.matched:
        total += sum(2 * ((p[a] - g[c]) ** 2 + (p[b] - g[d]) ** 2) for a, b, c, d in bars)
    for values, several in ((p, found.of_first), (g, found.of_second)):
        total += sum((values[a] - values[b]) ** 2 for bars in several for a, b in bars)
    return total


@pytest.mark.parametrize(
    ("mask", "connectivity", "expected"),
    [
        (blank(), 8, (0, 0)),
        (blank() + 1, 8, (1, 0)),
        (ring(), 4, (1, 1)),
        (ring() + ring(4, 8), 8, (2, 2)),
        (ring() + ring(5, 5), 8, (1, 2)),  # they touch at a corner
        (ring() + ring(5, 5), 4, (2, 2)),
        (np.eye(4), 8, (1, 0)),
        (np.eye(4), 4, (4, 0)),
        (np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 8, (1, 1)),
        (np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]]), 4, (4, 0)),
        (np.ones((1, 1)), 8, (1, 0)),
    ],
)
def test_betti_numbers(mask, connectivity, expected):
    """Of shapes that one can count; what is cut by the edge of the image is no hole."""
    assert betti_numbers(mask, connectivity=connectivity) == expected


@pytest.mark.parametrize(
    ("first", "second", "plain", "loss", "within_frame", "framed_loss"),
    [
        (ring(), ring(), (0, 0), 0, (0, 0), 0),
        (ring(1, 1), ring(4, 10), (0, 2), 2, (2, 2), 4),
        (square(1, 1), square(5, 10), (0, 0), 0, (2, 0), 2),
    ],
)
def test_the_values_of_the_fact_sheet(first, second, plain, loss, within_frame, framed_loss):
    """Rings and squares at different places in images of 10 by 16 pixels, without and with a frame."""
    assert betti_matching_error(first, second, frame=False) == plain
    assert betti_matching_error(first, second, frame=True) == within_frame
    assert loss_of(first, second) == loss
    assert loss_of(framed(first), framed(second)) == framed_loss


def test_a_ring_with_one_pixel_less():
    """Cut, its loop has no match; where the pixel is 0.4, the loop is born late: 2·0.6²."""
    whole, cut, weak = ring(1, 1), ring(1, 1), ring(1, 1)
    cut[1, 3], weak[1, 3] = 0, 0.4

    assert betti_matching_error(cut, whole, frame=False) == (0, 1)
    assert loss_of(cut, whole) == 1
    assert betti_matching(weak, whole).errors == (0, 0)
    assert loss_of(weak, whole) == pytest.approx(0.72)


def test_equal_counts_at_other_places_are_seen():
    """Two masks with the Betti numbers of the target, only one of them with its features."""
    target = square(1, 1) + square(1, 8)
    moved = square(1, 1) + square(6, 8)

    assert betti_numbers(target) == betti_numbers(moved)
    assert betti_matching_error(target, target) == (0, 0)
    assert betti_matching_error(moved, target) == (2, 0)


@given(masks, both, st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_error_is_symmetric_and_bounds_the_difference_of_betti_numbers(pair, connectivity, frame):
    """Per dimension, of any two masks; the same mask has none."""
    first, second = pair

    error = betti_matching_error(first, second, frame=frame, connectivity=connectivity)

    counts = [
        betti_numbers(framed(mask) if frame else mask, connectivity=connectivity) for mask in (first, second)
    ]
    if not frame:  # of which one component is always matched, even where there is none
        counts = [(max(b0, 1), b1) for b0, b1 in counts]
    assert betti_matching_error(second, first, frame=frame, connectivity=connectivity) == error
    assert all(e >= abs(p - g) for e, p, g in zip(error, *counts, strict=True))
    assert betti_matching_error(first, first, frame=frame, connectivity=connectivity) == (0, 0)


@given(masks, both)
@settings(max_examples=60, deadline=None)
def test_framed_components_are_matched_in_the_components_of_the_union(pair, connectivity):
    """b0(P) + b0(G) - 2·(components of the union that meet both)."""
    from scipy.ndimage import generate_binary_structure, label

    p, g = (framed(mask) != 0 for mask in pair)
    structure = generate_binary_structure(2, connectivity // 4)
    union, _ = label(p | g, structure)
    meeting = len((set(union[p]) & set(union[g])) - {0})
    b0 = [betti_numbers(mask, connectivity=connectivity)[0] for mask in (p, g)]

    assert betti_matching_error(*pair, connectivity=connectivity)[0] == sum(b0) - 2 * meeting


def as_lists(found):
    """Return the bars of a matching as sorted tuples."""
    parts = [
        [sorted(map(tuple, bars.tolist())) for bars in dims]
        for dims in (found.matched, found.of_first, found.of_second)
    ]
    return (*parts, found.essential.tolist())


@st.composite
def small_maps(draw):
    """Two maps with few values, so with ties and plateaus, or many; alike in parts, framed, empty or full."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    first, second = (
        draw(arrays(np.int64, shape, elements=st.integers(0, levels))) / levels for _ in range(2)
    )
    if draw(st.booleans()):
        second = np.where(draw(arrays(np.bool_, shape)), first, second)
    if draw(st.booleans()):
        first, second = framed(first), framed(second)
    return first, second


@given(small_maps(), both)
@settings(max_examples=100, deadline=None)
def test_it_is_the_plain_reduction_of_boundary_matrices(maps, connectivity):
    """Every bar, by the pixels of its birth and death, and every match."""
    assert as_lists(betti_matching(*maps, connectivity=connectivity)) == plain_matching(*maps, connectivity)


@pytest.mark.slow
@given(small_maps(), both)
@settings(max_examples=1000, deadline=None)
def test_it_is_the_plain_reduction_on_a_thousand_images(maps, connectivity):
    """The same, of more."""
    assert as_lists(betti_matching(*maps, connectivity=connectivity)) == plain_matching(*maps, connectivity)


def test_what_is_refused():
    """With the shape or value, and what it must be."""
    with pytest.raises(UserError, match=r"maps of shapes .2, 2. and .2, 3. must have the same"):
        betti_matching_error(np.ones((2, 2)), np.ones((2, 3)))
    with pytest.raises(UserError, match="connectivity=6 must be 4 or 8"):
        betti_matching_error(np.ones((2, 2)), np.ones((2, 2)), connectivity=6)
    with pytest.raises(UserError, match=r"a map of shape .0, 2. must be .H, W. with a pixel at least"):
        betti_matching_error(np.ones((0, 2)), np.ones((0, 2)), frame=False)
    with pytest.raises(UserError, match=r"a mask of shape .2,. must be .H, W."):
        betti_numbers(np.ones(2))
