"""Pictures and masks in files: read right at any depth of bits, or refused in one line that names them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lossworks.errors import UserError
from lossworks.files import reading

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".npy")
_LOSSY = (".jpg", ".jpeg", ".webp")
_COLOUR = 1 << 16  # colours are written as this number and 0xRRGGBB behind it
_NO_CODES = "a mask holds whole numbers from 0 to 65535, colours, or true and false"


class Picture(NamedTuple):
    """What a picture is.

    Attributes:
        image: Shape (C, H, W), of 8 or 16 bits or float32; one channel of grey, or three of colours, or as
            many as an array has.
        note: What was left out of it, such as ``alpha``; empty if nothing was.
    """

    image: np.ndarray
    note: str = ""


def read_picture(source: "Path | Image", where: str, size: tuple[int, int] | None = None) -> Picture:
    """Return a picture, turned as whoever took it held the camera.

    Args:
        source: A file, or an image of Pillow's.
        where: What messages call it.
        size: Height and width, by which the axes of an array with channels are told; None if unknown: then
            channels come first if these are the fewest.

    Raises:
        UserError: It can't be read, holds several pages, NaN or infinity, or is a pixel wide or high.
    """
    if isinstance(source, Path) and source.suffix.lower() == ".npy":
        found = Picture(channels_first(read_array(source), where, size))
    else:
        with _opened(source, where) as image:
            found = _picture(image)
    height, width = found.image.shape[1:]
    if min(height, width) < 2:
        raise UserError(f"{where}: is {height} x {width} pixels; two a side are the least")
    return found


def read_codes(source: "Path | Image", where: str) -> np.ndarray:
    """Return what a mask holds at each pixel, int32 (H, W): see :func:`name_of_code`.

    A palette's numbers are taken, not its colours.

    Raises:
        UserError: It can't be read, or is saved in a format that changes values.
    """
    if isinstance(source, Path) and source.suffix.lower() in _LOSSY:
        raise UserError(f"{where}: {source.suffix} files change values; save masks as PNG, TIFF or NPY")
    if isinstance(source, Path) and source.suffix.lower() == ".npy":
        return codes_of(read_array(source), where)
    with _opened(source, where) as image:
        array = np.asarray(image if image.mode in ("L", "P", "1") or _deep(image) else image.convert("RGB"))
    return _codes_of_colours(array) if array.ndim == 3 else codes_of(array, where)


def codes_of(array: np.ndarray, where: str) -> np.ndarray:
    """Return an array (…) of classes as codes, int32.

    Raises:
        UserError: It holds something else than whole numbers from 0 to 65535.
    """
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: holds {array.dtype}; {_NO_CODES}")
    codes = array.astype(np.int64) if np.isfinite(array).all() else np.full(array.shape, -1)
    wrong = (codes != array) | (codes < 0) | (codes >= _COLOUR)
    if wrong.any():
        raise UserError(f"{where}: holds {array[wrong].ravel()[0]}; {_NO_CODES}")
    return codes.astype(np.int32)


def name_of_code(code: int) -> str:
    """Return what a code is called: a number, or #rrggbb of a colour that is no grey."""
    return str(code) if code < _COLOUR else f"#{code - _COLOUR:06x}"


def code_of_name(name: str) -> int | None:
    """Return the code that :func:`name_of_code` has that name for, or None if there is none."""
    if name.isdecimal() and int(name) < _COLOUR:
        return int(name)
    try:
        value = int(name.removeprefix("#"), 16) if name.startswith("#") and len(name) == 7 else None
    except ValueError:
        return None
    if value is None:
        return None
    red, green, blue = value >> 16, value >> 8 & 255, value & 255
    return red if red == green == blue else _COLOUR + value


def read_array(path: Path) -> np.ndarray:
    """Return the array of an NPY file.

    Raises:
        UserError: It can't be read, or holds none.
    """
    with reading(f"{path}, as npy"):
        found = np.load(path, allow_pickle=False)
    if not isinstance(found, np.ndarray):
        found.close()
        raise UserError(f"{path}: holds several arrays, as npz; one is needed, as npy")
    return found


def channels_first(array: np.ndarray, where: str, size: tuple[int, int] | None = None) -> np.ndarray:
    """Return an image (H, W), (C, H, W) or (H, W, C) as (C, H, W): 8 and 16 bits stay, others are float32.

    Raises:
        UserError: It has other axes or no pixels, or holds something else than finite real numbers.
    """
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: holds {array.dtype}; real numbers are needed")
    if not array.size:
        raise UserError(f"{where}: is {array.shape}, so it has no pixels; each side must be at least 1")
    if array.ndim not in (2, 3):
        raise UserError(f"{where}: is {array.shape}; an image is (H, W), (C, H, W) or (H, W, C)")
    if array.ndim == 2:
        array = array[None]
    elif array.shape[1:] != size if size else array.shape[2] < array.shape[0]:
        array = np.moveaxis(array, 2, 0)
    if array.dtype in (np.uint8, np.uint16):
        return np.ascontiguousarray(array)
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(narrow).all():
        raise UserError(f"{where}: holds NaN, infinity, or numbers beyond ±3.4e38")
    return narrow


def of_channels(image: np.ndarray, wanted: int, where: str, whose: str) -> np.ndarray:
    """Return an image (C, H, W) with so many channels: grey becomes three colours alike, without a copy.

    Args:
        image: Any numbers.
        wanted: Channels.
        where: What messages call the image.
        whose: Who has so many, in words such as ``those of run 7``.

    Raises:
        UserError: It has other channels.
    """
    if len(image) == wanted:
        return image
    if (len(image), wanted) != (1, 3):
        raise UserError(f"{where}: has {len(image)} channels; {whose} have {wanted}")
    return np.broadcast_to(image, (wanted, *image.shape[1:]))


@contextmanager
def _opened(source: "Path | Image", where: str) -> Iterator["Image"]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("images need the library Pillow: install pillow") from None
    with reading(f"{where}, as an image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image: Any = Image.open(source) if isinstance(source, Path) else source
        if getattr(image, "n_frames", 1) > 1:
            raise UserError(f"{where}: holds {image.n_frames} pages; save each as a file of its own")
        # Cameras store how they were held, and what shows the picture turns it.
        turned = ImageOps.exif_transpose(image)
        turned.load()
        turned.format = image.format
        yield turned


def _deep(image: "Image") -> bool:
    return image.mode.startswith("I") or image.mode == "F"


def _picture(image: "Image") -> Picture:
    if _deep(image):
        array = np.asarray(image)
        # PNG has no more than sixteen bits, which some versions of Pillow widen to thirty-two.
        narrow = array.dtype.itemsize == 2 or image.format == "PNG"
        return Picture(channels_first(array.astype(np.uint16) if narrow else array, "image"))
    alpha = "alpha" if "A" in image.getbands() or "transparency" in image.info else ""
    grey = image.mode in ("1", "L", "LA", "La")
    pixels = np.asarray(image.convert("L" if grey else "RGB"))
    return Picture(
        channels_first(pixels, "image", pixels.shape[:2]) if grey else np.moveaxis(pixels, 2, 0), alpha
    )


def _codes_of_colours(pixels: np.ndarray) -> np.ndarray:
    """Return the codes of colours (H, W, 3) of 8 bits: of a grey its level, as in a file without colours."""
    red, green, blue = (pixels[..., at].astype(np.int32) for at in range(3))
    return np.where((red == green) & (green == blue), red, _COLOUR + (red << 16) + (green << 8) + blue)
