"""Betti matching: which components and loops of two maps are the same ones (Stucki et al., 2023).

Both maps, P and G, lie in their union U = max(P, G). Features of P that U still tells apart have bars,
too, those of the image of P in U: they are born in P and die in U. A bar of P belongs to the bar of U
whose death is that of the image's bar with its birth. Bars of P and of G are matched if they belong to the
same bar of U.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossworks.errors import UserError
from lossworks.metrics.persistence import CellComplex, Connectivity, Whole, cells_of, merges


@dataclass(frozen=True, eq=False)
class MatchedBars:
    """The bars of two maps P and G by the flat indices of the pixels where they are born and die.

    Attributes:
        matched: Of components and of loops, shape (m, 4) each: birth and death in P, birth and death in G.
        of_first: Bars of P without a match, shape (m, 2) each.
        of_second: Bars of G without a match, shape (m, 2) each.
        essential: Where the component that never dies is born in P and in G, shape (2,).
    """

    matched: tuple[Whole, Whole]
    of_first: tuple[Whole, Whole]
    of_second: tuple[Whole, Whole]
    essential: Whole

    @property
    def errors(self) -> tuple[int, int]:
        """How many bars have no match, of components and of loops."""
        first, second = (len(a) + len(b) for a, b in zip(self.of_first, self.of_second, strict=True))
        return first, second


@dataclass(frozen=True, eq=False)
class _Map:
    """A map with its cells: the values of its pixels, shape (H·W,)."""

    values: NDArray[Any]
    cells: CellComplex

    @classmethod
    def of(cls, values: NDArray[Any], connectivity: Connectivity) -> "_Map":
        return cls(values.reshape(-1), cells_of(values, connectivity))


@dataclass(frozen=True, eq=False)
class _Bars:
    """Bars of a map: the cell in which each is born, (m,), and the pixels of birth and death, (m, 2)."""

    born: Whole
    pixels: Whole

    @classmethod
    def of(cls, one: _Map, born: Whole, births: Whole, deaths: Whole) -> "_Bars":
        """Return those of a length above 0."""
        some = one.values[births] > one.values[deaths]
        return cls(born[some], np.stack((births, deaths), axis=1)[some])


def framed(values: NDArray[Any]) -> NDArray[Any]:
    """Return a map (H, W) with a border of ones around it, (H + 2, W + 2)."""
    return np.pad(values, 1, constant_values=1)


def require_alike(first: NDArray[Any], second: NDArray[Any]) -> None:
    """Refuse maps of unequal shapes.

    Raises:
        UserError: With both shapes.
    """
    if first.shape != second.shape:
        raise UserError(f"maps of shapes {first.shape} and {second.shape} must have the same")


def betti_matching(
    first: NDArray[Any], second: NDArray[Any], *, connectivity: Connectivity = 4
) -> MatchedBars:
    """Return the matching of two maps; their bars of length 0 are left out.

    A bar of the image is one only where it is born above the value at which it dies. The authors' code for
    three dimensions also matches by pairs of the reduction that are born below, which are no bars: it matches
    more of what is noise. Of masks both give the same.

    Args:
        first: P, shape (H, W), numbers or bool.
        second: G, of the same shape.
        connectivity: Of the foreground; the background has the other.

    Raises:
        UserError: The shapes differ or are empty, or the connectivity is another.
    """
    require_alike(first, second)
    p, g, u = (_Map.of(one, connectivity) for one in (first, second, np.maximum(first, second)))
    matched, of_first, of_second = zip(_components(p, g, u), _loops(p, g, u), strict=True)
    return MatchedBars(matched, of_first, of_second, np.array([_eldest(p), _eldest(g)]))


def betti_matching_error(
    prediction: NDArray[Any], target: NDArray[Any], *, frame: bool = True, connectivity: Connectivity = 4
) -> tuple[int, int]:
    """Return how many components and how many loops of two masks have no match in the other.

    At least the difference of the Betti numbers, and more where the features are at other places. Without a
    frame one component of each mask is always matched with one of the other, whatever their places.

    Args:
        prediction: Shape (H, W); what isn't 0 is foreground.
        target: Shape (H, W).
        frame: Whether a border of foreground is put around both, so that what touches the edge of the image
            counts as joined to what lies beyond.
        connectivity: Of the foreground, 4 or 8; the background has the other.

    Raises:
        UserError: The shapes differ or are empty, or the connectivity is another.

    Example:
        >>> import numpy as np
        >>> ring = np.ones((5, 5)); ring[1:4, 1:4] = 0
        >>> cut = ring.copy(); cut[0, 2] = 0
        >>> betti_matching_error(ring, cut, frame=False)
        (0, 1)
    """
    masks = [np.asarray(mask) != 0 for mask in (prediction, target)]
    require_alike(masks[0], masks[1])
    maps = [(framed(mask) if frame else mask).astype(np.float64) for mask in masks]
    return betti_matching(maps[0], maps[1], connectivity=connectivity).errors


def _components(p: _Map, g: _Map, u: _Map) -> tuple[Whole, Whole, Whole]:
    """Return the bars of components that are matched, and those of P and of G that are not, as pixels."""
    own = [merges(one.cells.components) for one in (p, g)]
    bars = [
        _Bars.of(one, joins.dying, one.cells.vertex_pixels[joins.dying], one.cells.edge_pixels[joins.edges])
        for one, joins in zip((p, g), own, strict=True)
    ]
    joins = merges(u.cells.components, [one.cells.components.node_keys for one in (p, g)])
    ends = u.values[u.cells.edge_pixels[joins.edges]]
    lives = [
        one.values[one.cells.vertex_pixels[nodes]] > ends
        for one, nodes in zip((p, g), joins.carried, strict=True)
    ]
    both = lives[0] & lives[1]
    return _sorted_out(bars[0], bars[1], joins.carried[0][both], joins.carried[1][both])


def _loops(p: _Map, g: _Map, u: _Map) -> tuple[Whole, Whole, Whole]:
    """Return the same of loops."""
    bars, living = zip(*(_loops_in_union(one, u) for one in (p, g)), strict=True)
    (of_p, holes_p), (of_g, holes_g) = living
    _, in_p, in_g = np.intersect1d(holes_p, holes_g, assume_unique=True, return_indices=True)
    return _sorted_out(bars[0], bars[1], of_p[in_p], of_g[in_g])


def _loops_in_union(one: _Map, u: _Map) -> tuple[_Bars, tuple[Whole, Whole]]:
    """Return a map's bars; and of those that live in U, where they are born and the square that ends them."""
    joins = merges(one.cells.background, [u.cells.background.node_keys])
    births, (holes,) = one.cells.edge_pixels[joins.edges], joins.carried
    bars = _Bars.of(one, joins.edges, births, one.cells.square_pixels[joins.dying])
    lives = one.values[births] > u.values[u.cells.square_pixels[holes]]
    return bars, (joins.edges[lives], holes[lives])


def _sorted_out(p: _Bars, g: _Bars, born_p: Whole, born_g: Whole) -> tuple[Whole, Whole, Whole]:
    """Return the bars (m, 4) that are born in the cells given, pair by pair, and the others of each."""
    (in_p, rest_p), (in_g, rest_g) = _found(p, born_p), _found(g, born_g)
    return np.concatenate((in_p, in_g), axis=1), rest_p, rest_g


def _found(bars: _Bars, born: Whole) -> tuple[Whole, Whole]:
    """Return the pixels of the bars born in some cells, in the order of those, and of all others."""
    order = np.argsort(bars.born)
    places = order[np.searchsorted(bars.born, born, sorter=order)]
    return bars.pixels[places], np.delete(bars.pixels, places, axis=0)


def _eldest(one: _Map) -> int:
    """Return the pixel in which the component begins that never dies."""
    return int(one.cells.vertex_pixels[one.cells.components.node_keys.argmin()])
