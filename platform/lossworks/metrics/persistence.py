"""Components and loops of 2-D maps over all thresholds: when they begin, when they end, and in which pixel.

A map f (H, W) is looked at through {f ≥ t} for falling t: the superlevel filtration. Its cells are vertices,
edges and squares of a lattice of h by w vertices; a cell enters with a pixel. With ``connectivity=4`` pixels
are the vertices (the V-construction), with 8 they are the squares (the T-construction). Components live in
the graph of vertices and edges. Loops are found in the dual graph of squares and edges, backwards: what
encloses a hole parts two regions of the background, which join when t rises to where the loop was closed.

Pixels are ordered by value and place, and cells by their pixel and place: so every cell has a rank of its
own, and equal values make nothing ambiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lossworks.errors import UserError

Connectivity = Literal[4, 8]
Whole = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class CellGraph:
    """A graph that grows in the order of its keys: N nodes, E edges between them.

    Attributes:
        node_keys: Distinct; a node with a smaller key is older, shape (N,).
        node_ranks: Of the pixel that a node enters with, shape (N,); negative in a dual graph.
        edge_keys: Distinct, shape (E,).
        edge_ranks: Of the pixel that an edge enters with, shape (E,).
        ends: The two nodes of each edge, shape (E, 2).
        around: The four edges of each node of the lattice, E where there is none, shape (n, 4) with n ≤ N.
    """

    node_keys: Whole
    node_ranks: Whole
    edge_keys: Whole
    edge_ranks: Whole
    ends: Whole
    around: Whole


@dataclass(frozen=True, eq=False)
class Merges:
    """The joins of components of a graph that end one which began with an earlier pixel, in their order.

    Attributes:
        edges: By which they join, shape (M,).
        dying: The oldest node of the component that ends, by the graph's own order, shape (M,).
        carried: The same by other orders, each shape (M,).
    """

    edges: Whole
    dying: Whole
    carried: tuple[Whole, ...]


@dataclass(frozen=True, eq=False)
class CellComplex:
    """The cells of a map with the pixels that they enter with.

    Attributes:
        components: The graph of vertices and edges.
        background: The dual graph of squares and edges; its last node is what lies around the map.
        vertex_pixels: Flat index of the pixel of each vertex.
        edge_pixels: Of each edge.
        square_pixels: Of each square.
    """

    components: CellGraph
    background: CellGraph
    vertex_pixels: Whole
    edge_pixels: Whole
    square_pixels: Whole


def cells_of(values: NDArray[Any], connectivity: Connectivity = 4) -> CellComplex:
    """Return the cells of a map.

    Args:
        values: Shape (H, W), a pixel at least.
        connectivity: Whether pixels of the foreground touch at their 4 sides, or at their corners, too: 8.

    Raises:
        UserError: The map is no matrix or has no pixel, or the connectivity is another.
    """
    if values.ndim != 2 or not values.size:
        raise UserError(f"a map of shape {values.shape} must be (H, W) with a pixel at least")
    if connectivity not in (4, 8):
        raise UserError(f"connectivity={connectivity!r} must be 4 or 8")
    order = np.argsort(-values.reshape(-1).astype(np.float64), kind="stable")
    ranks = np.empty(values.size, np.int64)
    ranks[order] = np.arange(values.size)
    v, e, s = (_entered if connectivity == 4 else _entered_as_squares)(ranks.reshape(values.shape))
    lattice = _lattice(*v.shape)
    v, s = v.reshape(-1), s.reshape(-1)
    edge_keys = e * len(e) + np.arange(len(e))
    components = CellGraph(
        v * len(v) + np.arange(len(v)), v, edge_keys, e, lattice.edge_vertices, lattice.around_vertices
    )
    square_keys = np.append(s * len(s) + np.arange(len(s)), _NEVER)
    background = CellGraph(
        -square_keys, -np.append(s, _NEVER), -edge_keys, -e, lattice.edge_squares, lattice.around_squares
    )
    return CellComplex(components, background, order[v], order[e], order[s])


def _entered(ranks: Whole) -> tuple[Whole, Whole, Whole]:
    """Return the ranks of vertices (h, w), edges (E,) and squares (h-1, w-1); pixels are the vertices."""
    across, down = np.maximum(ranks[:, :-1], ranks[:, 1:]), np.maximum(ranks[:-1], ranks[1:])
    squares = np.maximum(across[:-1], across[1:])
    return ranks, np.concatenate((across.reshape(-1), down.reshape(-1))), squares


def _entered_as_squares(ranks: Whole) -> tuple[Whole, Whole, Whole]:
    """Return the same where pixels are the squares."""
    around = np.pad(ranks, 1, constant_values=_NEVER)
    across = np.minimum(around[:-1, 1:-1], around[1:, 1:-1])
    down = np.minimum(around[1:-1, :-1], around[1:-1, 1:])
    lines = np.minimum(around[:-1], around[1:])
    vertices = np.minimum(lines[:, :-1], lines[:, 1:])
    return vertices, np.concatenate((across.reshape(-1), down.reshape(-1))), ranks


@dataclass(frozen=True, eq=False)
class _Lattice:
    """What lies beside what; see :class:`CellGraph`. Edges are those along rows, then those along columns."""

    edge_vertices: Whole
    around_vertices: Whole
    edge_squares: Whole
    around_squares: Whole


@lru_cache(maxsize=16)
def _lattice(h: int, w: int) -> _Lattice:
    vertices = np.arange(h * w).reshape(h, w)
    outside = (h - 1) * (w - 1)
    squares = np.pad(np.arange(outside).reshape(h - 1, w - 1), 1, constant_values=outside)
    count = h * (w - 1)
    edges = count + (h - 1) * w
    across = np.arange(count).reshape(h, w - 1)
    down = np.arange(count, edges).reshape(h - 1, w)
    beside = np.pad(across, ((0, 0), (1, 1)), constant_values=edges)
    above = np.pad(down, ((1, 1), (0, 0)), constant_values=edges)
    return _Lattice(
        _pairs((vertices[:, :-1], vertices[:, 1:]), (vertices[:-1], vertices[1:])),
        _flat(beside[:, :-1], beside[:, 1:], above[:-1], above[1:]),
        _pairs((squares[:-1, 1:-1], squares[1:, 1:-1]), (squares[1:-1, :-1], squares[1:-1, 1:])),
        _flat(across[:-1], across[1:], down[:, :-1], down[:, 1:]),
    )


def _flat(*columns: Whole) -> Whole:
    return np.stack([column.reshape(-1) for column in columns], axis=1)


def _pairs(*groups: tuple[Whole, Whole]) -> Whole:
    return np.concatenate([_flat(*group) for group in groups])


def merges(graph: CellGraph, carried: Sequence[Whole] = ()) -> Merges:
    """Return the joins of a graph, without those that end what began with the same pixel.

    A node whose first edge enters with it joins its neighbour at once. What is left are basins, one for each
    peak of the map, and between two of them only the first edge matters. So all but a spanning tree of the
    basins is done in whole arrays.

    Args:
        graph: Its nodes and edges, in their order.
        carried: Keys of the nodes (N,) in other orders. Of each component the oldest node by that order is
            known, too, and the younger of two ends; what it says of a node that enters behind the join is of
            no use, and such a bar is empty.
    """
    labels = _basins(graph)
    count = int(labels.max()) + 1
    oldest = [_oldest(keys, labels, count) for keys in (graph.node_keys, *carried)]
    edges, ends = _tree(graph, labels, count)
    keys = [own[nodes].tolist() for own, nodes in zip((graph.node_keys, *carried), oldest, strict=True)]
    dying = _joined(ends, keys)
    own, *others = (nodes[basin] for nodes, basin in zip(oldest, dying, strict=True))
    return Merges(edges, own, tuple(others))


def _basins(graph: CellGraph) -> Whole:
    """Return which basin each node belongs to, in [0, M), shape (N,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys = np.append(graph.edge_keys, _NEVER)
    n = len(graph.around)
    first = graph.around[np.arange(n), keys[graph.around].argmin(1)] if n else np.empty(0, np.int64)
    nodes = np.flatnonzero(np.append(graph.edge_ranks, _NEVER)[first] == graph.node_ranks[:n])
    left, right = graph.ends[first[nodes]].T
    size = len(graph.node_keys)
    links = coo_array((np.ones(len(nodes), np.int8), (left, right)), shape=(size, size))
    labels: Whole = connected_components(links, directed=False)[1].astype(np.int64)
    return labels


def _oldest(keys: Whole, labels: Whole, count: int) -> Whole:
    """Return the node with the least key of each basin, shape (M,)."""
    least = np.full(count, _NEVER)
    np.minimum.at(least, labels, keys)
    nodes = np.empty(count, np.int64)
    own = np.flatnonzero(keys == least[labels])
    nodes[labels[own]] = own
    return nodes


def _tree(graph: CellGraph, labels: Whole, count: int) -> tuple[Whole, Whole]:
    """Return the edges (M-1,) by which Kruskal's algorithm joins the basins, in order, and their ends."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    ends = labels[graph.ends]
    between = np.flatnonzero(ends[:, 0] != ends[:, 1])
    between = between[np.argsort(graph.edge_keys[between])]
    pairs = np.sort(ends[between], axis=1)
    # The first of each pair of basins, as `unique` returns the first place of equal numbers.
    places = np.unique(pairs[:, 0] * count + pairs[:, 1], return_index=True)[1]
    weights = (places + 1).astype(np.float64)  # exact, and 0 would be no edge
    low, high = pairs[places].T
    chosen = minimum_spanning_tree(coo_array((weights, (low, high)), shape=(count, count)).tocsr()).data
    kept = np.sort(chosen).astype(np.int64) - 1
    return between[kept], pairs[kept]


def _joined(ends: Whole, keys: list[list[int]]) -> list[Whole]:
    """Return which basin's oldest node ends with each join, for every order; basins join by each pair."""
    parents = list(range(len(keys[0])))
    oldest = [list(parents) for _ in keys]
    dying: list[list[int]] = [[] for _ in keys]
    for one, other in ends.tolist():
        a, b = one, other
        while parents[a] != a:
            parents[a] = a = parents[parents[a]]
        while parents[b] != b:
            parents[b] = b = parents[parents[b]]
        parents[b] = a
        for own, best, ended in zip(keys, oldest, dying, strict=True):
            x, y = best[a], best[b]
            if own[x] < own[y]:
                ended.append(y)
            else:
                ended.append(x)
                best[a] = y
    return [np.array(ended, np.int64) for ended in dying]
