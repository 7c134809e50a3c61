"""Arrays that may be larger than memory: written block by block to a file, and mapped."""

import tempfile
from collections.abc import Callable, Iterable

import numpy as np

from lossworks.errors import UserError
from lossworks.home import home

ROWS_AT_ONCE = 2**16


def on_disk(blocks: Iterable[np.ndarray], shape: tuple[int, ...]) -> np.memmap:
    """Return blocks of rows as one array, which lies in a file without a name in the home folder.

    The file is gone when nobody has the array any more, however the process ends. What is written to the
    array stays in memory.

    Args:
        blocks: One after the other, float32; together of the shape.
        shape: Of the whole, (N, …).

    Raises:
        UserError: There is no room for it.
    """
    folder = home()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for block in blocks:
                file.write(np.ascontiguousarray(block, dtype=np.float32).data)
            file.flush()
            return np.memmap(file, dtype=np.float32, mode="c", shape=shape)
    except OSError as error:
        size = 4 * int(np.prod(shape, dtype=np.int64)) / 2**30
        raise UserError(f"{folder}: {size:.1f} GiB of examples can't be written: {error.strerror}") from None


def rows_of(inputs: np.ndarray, rows: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return some rows of an array after a change of each, on disk where the array is.

    Args:
        inputs: Shape (N, …).
        rows: Which, int64 (M,).
        change: Gives float32 (B, …) for rows (B, …).

    Returns:
        Float32 (M, …).
    """
    if not isinstance(inputs, np.memmap):
        return change(inputs[rows])
    starts = range(0, len(rows), ROWS_AT_ONCE)
    blocks = (change(np.asarray(inputs[rows[start : start + ROWS_AT_ONCE]])) for start in starts)
    return on_disk(blocks, (len(rows), *inputs.shape[1:]))
