"""Which shares of its pixels an image is expected to have of each class, where somebody knows that."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lossworks.errors import UserError
from lossworks.files import reading


def read_priors(path: Path, keys: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Return the expected shares of the classes of each image, float32 (N, K), each row summing to 1.

    A class that is known to be absent has the share 0.

    Args:
        path: A CSV file with the column ``image`` and one for each class.
        keys: What the images are called, without folder and ending.
        names: Of the classes.

    Raises:
        UserError: It can't be read, lacks an image or a class, or holds what are no shares.
    """
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    for name in ("image", *names):
        if name not in columns:
            raise UserError(f"data.priors=csv:{path}: has no column {name}; it has {', '.join(columns)}")
    by_image = {str(row["image"]): row for row in rows}
    for key in keys:
        if key not in by_image:
            raise UserError(f"data.priors=csv:{path}: has no row for image {key}")
    shares = np.array([[_share(by_image[key][name], key, name, path) for name in names] for key in keys])
    for key, total in zip(keys, shares.sum(1), strict=True):
        if total == 0:
            raise UserError(f"data.priors=csv:{path}: the shares of image {key} are all 0")
    found: np.ndarray = (shares / shares.sum(1, keepdims=True)).astype(np.float32)
    return found


def _share(text: str | None, key: str, name: str, path: Path) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(
            f"data.priors=csv:{path}: {name}={text} of image {key} must be a number of at least 0"
        )
    return value
