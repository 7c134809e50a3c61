"""How the CPU path cuts N rows and V classes into tiles: from the caches, the shapes and a memory limit."""

from dataclasses import dataclass, replace

import torch

# A chunk of rows reads C twice and reads and writes ∂C once. At 512 rows that memory traffic is a few per
# cent of the products; below 128 the products wait for it, and computing the logits twice costs less.
_GOOD_ROWS = 512
_LEAST_ROWS = 128
# A buffer of this size costs nothing that anybody would notice, however small the logits are.
_FREE_BYTES = 64 * 2**20
# Kept columns are those that any row of a tile wants: few rows want few.
_FILTERED_ROWS = 256
_ALIGNED = 16  # rows, for the vector units
# Few, since a row on its own costs as many. A multiple of 24 and 48, the rows that BLAS takes at once in
# float64 and float32: of other numbers the last rows get another order of sums (64 failed in float64).
FIXED_ROWS = 96
_FIXED_CLASSES = 1024


@dataclass(frozen=True)
class TileSizes:
    """The tiles of one pass.

    Attributes:
        rows: Rows a chunk.
        classes: Classes a block; a tile is classes × rows.
        keep: Whether the logits of a chunk, V × rows, are kept between the forward sums and the gradient
            (three matrix products); else they are computed twice (four), and no buffer grows with V.
        borrow: Whether they are kept in the memory of ∂C, which has room for D rows until it is written.
    """

    rows: int
    classes: int
    keep: bool
    borrow: bool = False


def choose_tile_sizes(
    rows: int, classes: int, itemsize: int, share: float, *, keep: bool, filtered: bool
) -> TileSizes:
    """Choose the tiles for ``rows`` × ``classes`` logits.

    Args:
        rows: N.
        classes: V.
        itemsize: Bytes of a logit.
        share: Largest buffer as a share of N·V·itemsize.
        keep: Whether keeping a chunk's logits would help: a gradient follows with known coefficients.
        filtered: Whether columns are to be left out.
    """
    limit = max(share * rows * classes * itemsize, _FREE_BYTES if share >= 0.05 else 0)
    affordable = int(limit / (classes * itemsize)) // _ALIGNED * _ALIGNED
    good = _FILTERED_ROWS if filtered else _GOOD_ROWS
    if keep and affordable >= min(rows, _LEAST_ROWS):
        chunk = min(rows, good, max(affordable, 1))
    else:
        keep, chunk = False, min(rows, good if filtered else 4 * _GOOD_ROWS)
    return TileSizes(chunk, _block(chunk, classes, itemsize, limit), keep)


def fixed_tile_sizes(classes: int) -> TileSizes:
    """Return tiles that follow neither the number of rows nor the machine, for the same bits in any batch."""
    return TileSizes(FIXED_ROWS, min(classes, _FIXED_CLASSES), keep=False)


def borrowing(plan: TileSizes, rows: int, features: int) -> TileSizes:
    """Return a plan that keeps the logits in ∂C, (V, D), if they fit and are not kept anyway."""
    if plan.keep or not 0 < rows <= features:
        return plan
    return replace(plan, keep=True, borrow=True, classes=max(1, plan.classes * plan.rows // rows))


def _block(rows: int, classes: int, itemsize: int, limit: float) -> int:
    """Return classes a block: a tile as large as the second-level caches, and within the limit."""
    tile = min(_cache_bytes(), max(limit / 2, 2**20))
    block = int(tile / (max(rows, 1) * itemsize)) // _ALIGNED * _ALIGNED
    return max(1, min(classes, max(block, 128)))


def _cache_bytes() -> int:
    """Return the second-level caches of the threads in use, the rest of which is the operands' share."""
    size = torch.cpu.get_capabilities().get("l2_cache_size")
    return 2 * max(2**20, int(size or 0)) * min(4, torch.get_num_threads())
