"""Betti matching by the plain reduction of boundary matrices, written apart from the library's.

Slow, and for small maps: every cell of the lattice is a column, a set of rows. A cell's place is (rank of the
pixel that it enters with, dimension, index among its like).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LatticeCells = tuple[dict[int, int], list[list[int]], list[list[list[int]]]]
"""The rank of each pixel, and by dimension the pixel that each cell enters with, and its boundary."""


def boundary_cells(values: NDArray[Any], connectivity: int) -> LatticeCells:
    """Return for each cell its place and its boundary, as lists of indices, by dimension.

    Args:
        values: Of pixels, shape (H, W).
        connectivity: 4 or 8, of the foreground.
    """
    height, width = (int(side) for side in values.shape)
    order = sorted(range(values.size), key=lambda i: (-values.flat[i], i))
    rank = {pixel: place for place, pixel in enumerate(order)}
    square = connectivity == 8
    h, w = (height + 1, width + 1) if square else (height, width)

    def pixel_of(vertices: list[tuple[int, int]]) -> int:
        """Return the pixel a cell enters with: the last of its vertices, or the first square on it."""
        if not square:
            return max((i * width + j for i, j in vertices), key=rank.__getitem__)
        rows, columns = zip(*vertices, strict=True)
        around = [
            i * width + j
            for i in range(max(rows) - 1, min(rows) + 1)
            for j in range(max(columns) - 1, min(columns) + 1)
            if 0 <= i < height and 0 <= j < width
        ]
        return min(around, key=rank.__getitem__)

    corners: list[list[list[tuple[int, int]]]] = [
        [[(i, j)] for i in range(h) for j in range(w)],
        [[(i, j), (i, j + 1)] for i in range(h) for j in range(w - 1)]
        + [[(i, j), (i + 1, j)] for i in range(h - 1) for j in range(w)],
        [[(i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)] for i in range(h - 1) for j in range(w - 1)],
    ]
    numbers: list[dict[Any, int]] = [
        {tuple(sorted(c)): n for n, c in enumerate(of_dim)} for of_dim in corners
    ]
    pixels = [[pixel_of(c) for c in of_dim] for of_dim in corners]
    faces: list[list[list[int]]] = [[] for _ in corners]
    faces[1] = [[numbers[0][one,] for one in c] for c in corners[1]]
    sides = ((0, 1), (2, 3), (0, 2), (1, 3))
    faces[2] = [[numbers[1][c[a], c[b]] for a, b in sides] for c in corners[2]]
    return rank, pixels, faces


def reduced_pairs(
    rows: tuple[dict[int, int], list[list[int]]],
    columns: tuple[dict[int, int], list[list[int]]],
    faces: list[list[list[int]]],
    dim: int,
) -> list[tuple[int, int]]:
    """Return (row, column) of every pivot; rows and columns are (rank, pixels) of two filtrations."""
    (row_rank, row_pixels), (column_rank, column_pixels) = rows, columns
    row_key = [(row_rank[p], n) for n, p in enumerate(row_pixels[dim])]
    order = sorted(range(len(faces[dim + 1])), key=lambda n: (column_rank[column_pixels[dim + 1][n]], n))
    reduced: dict[int, set[int]] = {}
    found = []
    for column in order:
        cycle = set(faces[dim + 1][column])
        while cycle:
            pivot = max(cycle, key=row_key.__getitem__)
            if pivot not in reduced:
                reduced[pivot] = cycle
                found.append((pivot, column))
                break
            cycle = cycle ^ reduced[pivot]
    return found


def plain_matching(
    first: NDArray[Any], second: NDArray[Any], connectivity: int
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any], list[int]]:
    """Return what ``betti_matching`` gives as sorted lists: matched, of first, of second, essential.

    Args:
        first: Map P, shape (H, W).
        second: Map G, shaped alike.
        connectivity: 4 or 8, of the foreground.
    """
    maps = [np.asarray(m, dtype=float) for m in (first, second)]
    union = np.maximum(*maps)
    (rank_p, pix_p, faces), (rank_g, pix_g, _), (rank_u, pix_u, _) = (
        boundary_cells(m, connectivity) for m in (*maps, union)
    )
    matched: list[list[Any]] = [[], []]
    alone: list[list[list[Any]]] = [[[], []], [[], []]]
    for dim in (0, 1):
        homes = []
        bars = []
        for values, rank, pix in ((maps[0], rank_p, pix_p), (maps[1], rank_g, pix_g)):
            own = {
                i: (pix[dim][i], pix[dim + 1][j])
                for i, j in reduced_pairs((rank, pix), (rank, pix), faces, dim)
                if values.flat[pix[dim][i]] > values.flat[pix[dim + 1][j]]
            }
            image = {
                j: i
                for i, j in reduced_pairs((rank, pix), (rank_u, pix_u), faces, dim)
                if values.flat[pix[dim][i]] > union.flat[pix_u[dim + 1][j]]
            }
            bars.append(own)
            homes.append(image)
        of_union = {
            j
            for i, j in reduced_pairs((rank_u, pix_u), (rank_u, pix_u), faces, dim)
            if union.flat[pix_u[dim][i]] > union.flat[pix_u[dim + 1][j]]
        }
        for j in of_union & homes[0].keys() & homes[1].keys():
            p, g = homes[0][j], homes[1][j]
            matched[dim].append((*bars[0].pop(p), *bars[1].pop(g)))
        for which in (0, 1):
            alone[which][dim] = sorted(bars[which].values())
        matched[dim].sort()
    essential = [
        min(range(m.size), key=rank.__getitem__) for m, rank in zip(maps, (rank_p, rank_g), strict=True)
    ]
    return matched, alone[0], alone[1], essential
