"""Where images with masks come from that are somebody's own: a folder, an npz file, or a hub."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.example_sources import existing_file, existing_folder, read_arrays
from lossworks.data.images.picture_files import (
    PICTURES,
    Picture,
    channels_first,
    code_of_name,
    codes_of,
    name_of_code,
    of_channels,
    read_codes,
    read_picture,
)
from lossworks.data.learnt import Learnt
from lossworks.data.text.readers import hub_call, import_datasets
from lossworks.errors import UserError
from lossworks.files import reading, within
from lossworks.specs.tasks.segmentation import MasksSpec

BINARY = ("background", "foreground")
"""The classes of masks that hold 0 and 255, or 0 and 1."""

_MOST = 64  # classes that nobody has named
_NAMED = ("classes.txt", "classes.json")


class ReadMasks(NamedTuple):
    """What a source gives.

    Attributes:
        images: N arrays (C, H, W), of 8 or 16 bits or float32; C is the same of all.
        masks: N arrays (H, W), int16 classes; -100 for what counts for nothing.
        keys: What the images are called.
        names: Of the classes, in the order of their numbers.
        notes: What whoever owns the images should know, a sentence each.
    """

    images: Sequence[np.ndarray]
    masks: Sequence[np.ndarray]
    keys: Sequence[str]
    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


class _Raw(NamedTuple):
    """Pictures with what their masks hold.

    Attributes:
        pictures: Of N images.
        codes: Of their masks, int32 (H, W) each.
        keys: What the images are called.
        places: What messages call the masks.
        named: Names of codes, None for what counts for nothing; empty where nobody has given any.
        notes: What to know of the source.
    """

    pictures: Sequence[Picture]
    codes: Sequence[np.ndarray]
    keys: Sequence[str]
    places: Sequence[str]
    named: Mapping[int, str | None]
    notes: tuple[str, ...] = ()


def read_masks(spec: MasksSpec, learnt: Learnt | None = None) -> ReadMasks:
    """Return the images and masks of a folder, an npz file or a data set of the Hugging Face hub.

    Args:
        spec: Names the source.
        learnt: What a model has learnt already.

    Raises:
        UserError: Something can't be read, fits nothing else, or holds a value that is no class.
    """
    kind, _, name = spec.source.partition(":")
    if spec.unlabelled:
        return _unlabelled(existing_folder(name), learnt, links=spec.follow_links)
    if kind == "folder":
        raw = _folder(existing_folder(name), links=spec.follow_links)
    else:
        raw = _npz(existing_file(name)) if kind == "npz" else _hugging_face(name, spec)
    held = [np.unique(codes) for codes in raw.codes]
    names = dict(raw.named) or _told(raw.places, held, spec.ignore, learnt)
    if spec.ignore is not None:
        names.setdefault(spec.ignore, None)
    known = None if learnt is None else tuple(map(str, learnt.fact("classes")))
    _require_known(raw.places, held, names, known if spec.classes is None and not spec.foreground else None)
    kept = list(dict.fromkeys(one for one in names.values() if one is not None))
    numbers = {code: IGNORE_INDEX if one is None else kept.index(one) for code, one in names.items()}
    masks = [_numbered(codes, numbers) for codes in raw.codes]
    images, notes = _alike(raw, learnt)
    return ReadMasks(images, masks, raw.keys, tuple(kept), (*raw.notes, *notes))


def _unlabelled(path: Path, learnt: Learnt | None, *, links: bool) -> ReadMasks:
    """Return the pictures of a folder without masks, of whose pixels all count; the classes are a model's.

    Raises:
        UserError: A picture can't be read, or there is no model.
    """
    if learnt is None:
        raise UserError("data.unlabelled=true: needs a trained model to adapt: set start=RUN")
    below = (path, "images") if (path / "images").is_dir() else (path.parent, path.name)
    files = _files(*below, links=links)
    pictures = [read_picture(file, str(file)) for file in files.pictures.values()]
    masks = [np.zeros(picture.image.shape[1:], dtype=np.int16) for picture in pictures]
    keys = list(files.pictures)
    raw = _Raw(pictures, [], keys, [], {}, files.notes)
    images, notes = _alike(raw, learnt)
    return ReadMasks(images, masks, keys, tuple(map(str, learnt.fact("classes"))), (*files.notes, *notes))


def _told(
    places: Sequence[str], held: Sequence[np.ndarray], ignore: int | None, learnt: Learnt | None
) -> dict[int, str | None]:
    """Return names of all codes that masks hold, where nobody has named them."""
    values = sorted({int(code) for codes in held for code in codes})
    if values != [0, 255]:
        values = [code for code in values if code != ignore]
    if len(values) > _MOST:
        most = max(range(len(held)), key=lambda at: len(held[at]))
        raise UserError(
            f"{places[most]}: holds {len(held[most])} different values, and all masks {len(values)}; "
            f"more than {_MOST} are classes only where {_NAMED[0]} or {_NAMED[1]} beside images/ names them"
        )
    own = () if learnt is None else tuple(learnt.fact("classes"))
    binary = values in ([0, 1], [0, 255]) or (own == BINARY and set(values) < {0, 1, 255})
    return {code: BINARY[code > 0] if binary else name_of_code(code) for code in values}


def _require_known(
    places: Sequence[str],
    held: Sequence[np.ndarray],
    names: Mapping[int, str | None],
    own: tuple[str, ...] | None,
) -> None:
    """Refuse masks with codes that have no name, or with names that a model doesn't know.

    Raises:
        UserError: Naming file and value.
    """
    for place, codes in zip(places, held, strict=True):
        for code in map(int, codes):
            name = names.get(code)
            if code not in names or (own is not None and name is not None and name not in own):
                there = own or [
                    f"{name_of_code(at)} {name}" for at, name in names.items() if name is not None
                ]
                raise UserError(
                    f"{place}: holds {name_of_code(code)}, which is no class; there are "
                    f"{', '.join(list(there)[:20])}; {' or '.join(_NAMED)} beside images/ can name values"
                )


def _numbered(codes: np.ndarray, numbers: Mapping[int, int]) -> np.ndarray:
    """Return the numbers of codes, all of which have one."""
    known = sorted(numbers)
    found = np.array([numbers[code] for code in known], dtype=np.int16)
    return found[np.searchsorted(np.array(known), codes)]


def _alike(raw: _Raw, learnt: Learnt | None) -> tuple[list[np.ndarray], list[str]]:
    """Return images of equally many channels, and notes on what was done for that.

    Grey ones become three colours where others are coloured.
    """
    images = [picture.image for picture in raw.pictures]
    wanted = max(len(image) for image in images)
    if learnt is not None:
        wanted = int(learnt.fact("channels"))
    notes = [
        f"{what} of {count} images is left out"
        for what in sorted({picture.note for picture in raw.pictures if picture.note})
        if (count := sum(picture.note == what for picture in raw.pictures))
    ]
    whose = f"those of {learnt.source}" if learnt is not None else "others"
    full = [
        of_channels(image, wanted, f"image {key}", whose) for key, image in zip(raw.keys, images, strict=True)
    ]
    grey = sum(len(image) < wanted for image in images)
    if grey:
        notes.append(f"{grey} grey images are read as images of three colours")
    return full, notes


def _folder(path: Path, *, links: bool) -> _Raw:
    files = {part: _files(path, part, links=links) for part in ("images", "masks")}
    for part, other, lacks in (("images", "masks", "mask"), ("masks", "images", "image")):
        for key, file in files[part].pictures.items():
            if key not in files[other].pictures:
                there = next(iter(files[other].pictures.values()))
                raise UserError(
                    f"{file}: there is no {lacks} {path / other / key}.*; names must be equal, and there is "
                    f"{there.name}"
                )
    keys = sorted(files["images"].pictures)
    places = [str(files["masks"].pictures[key]) for key in keys]
    codes = [read_codes(files["masks"].pictures[key], place) for key, place in zip(keys, places, strict=True)]
    pictures = []
    for key, held, place in zip(keys, codes, places, strict=True):
        file = files["images"].pictures[key]
        size = (held.shape[0], held.shape[1]) if held.ndim == 2 else None
        pictures.append(read_picture(file, str(file), size))
        _require_size(held, pictures[-1].image, place, str(file))
    return _Raw(pictures, codes, keys, places, _names(path), files["images"].notes + files["masks"].notes)


class _Files(NamedTuple):
    """Pictures below a folder by their path without its ending, and notes on what else there is."""

    pictures: dict[str, Path]
    notes: tuple[str, ...]


def _files(path: Path, part: str, *, links: bool) -> _Files:
    if not (path / part).is_dir():
        raise UserError(
            f"{path}: has no folder {part}/; images/ and masks/ with files of equal names are needed"
        )
    found = sorted(
        file
        for file in (path / part).rglob("*")
        if not any(name.startswith(".") for name in file.relative_to(path).parts) and file.is_file()
    )
    files = [file for file in found if file.suffix.lower() in PICTURES and (links or within(file, path))]
    keys = [file.relative_to(path / part).with_suffix("").as_posix() for file in files]
    for one, other in pairwise(sorted(zip(keys, files, strict=True))):
        if one[0] == other[0]:
            raise UserError(f"{one[1]} and {other[1].name}: have the same name; which one counts?")
    if not files:
        raise UserError(f"{path / part}: holds no images ({', '.join(PICTURES)})")
    others = [file for file in found if file not in files]
    notes = (
        (f"{part}/ holds {len(others)} files that are not read, such as {others[0].name}",) if others else ()
    )
    return _Files(dict(zip(keys, files, strict=True)), notes)


def _names(path: Path) -> dict[int, str | None]:
    """Return the names of codes that a folder gives, if it does."""
    there = [path / name for name in _NAMED if (path / name).is_file()]
    if len(there) > 1:
        raise UserError(f"{path}: has both {' and '.join(_NAMED)}; which one counts?")
    if not there:
        return {}
    with reading(there[0]):
        text = there[0].read_text(encoding="utf-8-sig")
        found = _names_in_lines(text) if there[0].suffix == ".txt" else _names_in_json(text, there[0])
    names = [name for name in found.values() if name is not None]
    for code, name in found.items():
        if name == "":
            raise UserError(f"{there[0]}: the class of {name_of_code(code)} has no name; each needs one")
    if len(names) < 2:
        given = f"names one class, {names[0]}" if names else "names no class"
        raise UserError(f"{there[0]}: {given}; at least two classes are needed, each with a name")
    return found


def _names_in_lines(text: str) -> dict[int, str | None]:
    """Return the names of 0, 1, …, one a line."""
    return dict(enumerate(line.strip() for line in text.rstrip().splitlines()))


def _names_in_json(text: str, path: Path) -> dict[int, str | None]:
    """Return names of values or colours; null for what counts for nothing."""
    values = json.loads(text)
    if not isinstance(values, dict) or not all(isinstance(name, str | None) for name in values.values()):
        raise UserError(f'{path}: must be like {{"0": "background", "#ff0000": "wall", "255": null}}')
    found: dict[int, str | None] = {}
    for value, name in values.items():
        code = code_of_name(value)
        if code is None:
            raise UserError(f"{path}: {value!r} is no value from 0 to 65535 and no colour like #ff0000")
        found[code] = name
    return found


def _require_size(codes: np.ndarray, image: np.ndarray, place: str, where: str) -> None:
    if codes.shape != image.shape[1:]:
        own, other = (" x ".join(map(str, shape)) for shape in (codes.shape, image.shape[1:]))
        raise UserError(f"{place}: the mask is {own} pixels; its image {where} is {other}")


def _npz(path: Path) -> _Raw:
    arrays = read_arrays(path, ["x", "y"])
    x, y = arrays["x"], arrays["y"]
    if y.ndim != 3 or x.ndim not in (3, 4) or len(x) != len(y) or not x.size:
        raise UserError(
            f"{path}: x {x.shape} must be (N, H, W), (N, C, H, W) or (N, H, W, C), and y {y.shape} (N, H, W)"
        )
    keys = [f"{path}, x[{at}]" for at in range(len(x))]
    places = [f"{path}, y[{at}]" for at in range(len(y))]
    pictures = [
        Picture(channels_first(image, key, mask.shape)) for image, mask, key in zip(x, y, keys, strict=True)
    ]
    for picture, mask, place, key in zip(pictures, y, places, keys, strict=True):
        _require_size(mask, picture.image, place, key)
    return _Raw(pictures, [codes_of(mask, at) for mask, at in zip(y, places, strict=True)], keys, places, {})


def _hugging_face(name: str, spec: MasksSpec) -> _Raw:
    where = f"data.source='hf:{name}'"
    load_dataset = import_datasets(where).load_dataset
    found = hub_call(where, lambda: load_dataset(name, split="train"))
    for column in (spec.input, spec.label):
        if column not in found.column_names:
            raise UserError(f"{where}: has no column {column}; there are {', '.join(found.column_names)}")
        if len(found) and not hasattr(found[0][column], "convert"):
            raise UserError(f"{where}: column {column} holds no images")
    keys = [f"{where}, row {at}" for at in range(len(found))]
    places = [f"{key}, {spec.label}" for key in keys]
    pictures, codes = [], []
    for row, key, place in zip(found, keys, places, strict=True):
        pictures.append(read_picture(row[spec.input], key))
        codes.append(read_codes(row[spec.label], place))
        _require_size(codes[-1], pictures[-1].image, place, key)
    return _Raw(pictures, codes, keys, places, {})
