"""Where labelled examples come from: every source gives inputs (N, …), labels (N,) and the classes' names."""

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lossworks.data.learnt import Learnt
from lossworks.data.on_disk import ROWS_AT_ONCE, on_disk
from lossworks.data.tables import Cells, Features, read_cells
from lossworks.data.text.readers import hub_call, import_datasets
from lossworks.errors import UserError
from lossworks.files import reading, within
from lossworks.specs import ExamplesSpec
from lossworks.specs.tasks.values import TableSpec

_MANY = 10**6  # points from which blobs are on disk
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Read(NamedTuple):
    """What a source gives.

    Attributes:
        inputs: Shape (N, …), numbers.
        labels: Shape (N,), int64 in [0, K).
        names: Of the K classes.
        owners: Whom each example belongs to, texts of shape (N,), or None if nobody asked.
        features: How the columns of a table became inputs, of one.
    """

    inputs: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    owners: np.ndarray | None = None
    features: Features | None = None


def read_examples(spec: ExamplesSpec, seed: int, learnt: Learnt | None = None) -> Read:
    """Return the examples of a source.

    Args:
        spec: Names the source.
        seed: Of sources that are drawn.
        learnt: What a model has learnt already.

    Raises:
        UserError: The source can't be read.
    """
    found = _read(spec, seed, learnt)
    if len(found.names) < 2 and learnt is None:  # who has learnt its classes needn't see all of them here
        raise UserError(f"the labels hold {len(found.names)} class; two are the least")
    return found if spec.classes is None else _of_classes(found, [str(name) for name in spec.classes])


def _of_classes(found: Read, kept: list[str]) -> Read:
    """Return the examples of some classes, numbered in the order in which they are named."""
    missing = [name for name in kept if name not in found.names]
    if missing:
        raise UserError(f"data.classes: {missing[0]} is no class; there are {', '.join(found.names)}")
    if len(set(kept)) < len(kept):
        raise UserError(f"data.classes=[{', '.join(kept)}]: names a class twice")
    numbers = np.array([kept.index(name) if name in kept else -1 for name in found.names])[found.labels]
    rows = numbers >= 0
    owners = None if found.owners is None else found.owners[rows]
    return Read(found.inputs[rows], numbers[rows].astype(np.int64), tuple(kept), owners, found.features)


def _read(spec: ExamplesSpec, seed: int, learnt: Learnt | None) -> Read:
    kind, _, name = spec.source.partition(":")
    match kind:
        case "csv" | "parquet":
            return _table(existing_file(name), spec, learnt)
        case "npz":
            return _npz(existing_file(name), spec.owner)
        case "imagefolder":
            return _image_folder(existing_folder(name), spec.image_size, links=spec.follow_links)
        case "hf":
            return _hugging_face(name, spec)
        case "blobs" | "mnist1d":
            return _blobs(int(name), seed) if kind == "blobs" else _mnist1d(seed)
        case _:
            return _scikit_learn(kind)


def _numbered(labels: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels as numbers in the order of their sorted names, and the names.

    Raises:
        UserError: A label is NaN, or none of what labels can be.
    """
    given = np.asarray(labels)
    if given.dtype.kind == "S":
        given = np.char.decode(given, "utf-8", "replace")
    if given.dtype.kind not in "biufU":
        raise UserError(f"the labels are {given.dtype}; they must be texts, integers or real numbers")
    names, numbers = np.unique(given, return_inverse=True)
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise UserError("a label is NaN or infinite")
    order = in_order(names)
    places = np.argsort(order)
    return places[numbers.reshape(-1)].astype(np.int64), tuple(str(names[at]) for at in order)


def in_order(names: np.ndarray) -> np.ndarray:
    """Return the order of sorted names (K,), int64: that of the numbers, where all names are numbers."""
    try:
        values = names.astype(np.float64)
    except ValueError:
        return np.arange(len(names))
    return np.argsort(values, kind="stable") if np.isfinite(values).all() else np.arange(len(names))


def existing_file(name: str) -> Path:
    """Return the file that ``data.source`` names.

    Raises:
        UserError: There is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"data.source: {path}: {'is no file' if path.exists() else 'no such file'}")
    return path


def existing_folder(name: str) -> Path:
    """Return the folder that ``data.source`` names.

    Raises:
        UserError: There is none.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"data.source: {path}: {'is no folder' if path.exists() else 'no such folder'}")
    return path


def _scikit_learn(name: str) -> Read:
    from sklearn import datasets

    loaders = {
        "digits": datasets.load_digits,
        "breast-cancer": datasets.load_breast_cancer,
        "wine": datasets.load_wine,
    }
    found = loaders[name]()
    inputs = found.images[:, None] if name == "digits" else found.data
    return Read(inputs, found.target.astype(np.int64), tuple(str(label) for label in found.target_names))


def _blobs(examples: int, seed: int) -> Read:
    """Return points around 10 centres in 32 dimensions, which no classifier tells apart without errors.

    From a million points on they are drawn in blocks, which are kept on disk.
    """
    if examples >= _MANY:
        return _many_blobs(examples, seed)
    from sklearn.datasets import make_blobs

    inputs, labels = make_blobs(
        examples, n_features=32, centers=10, cluster_std=2.5, center_box=(-1.5, 1.5), random_state=seed
    )
    return Read(inputs, labels.astype(np.int64), tuple(str(number) for number in range(10)))


def _many_blobs(examples: int, seed: int) -> Read:
    stream = np.random.default_rng([seed, _MANY])
    centres = stream.uniform(-1.5, 1.5, (10, 32)).astype(np.float32)
    labels = stream.permutation(np.arange(examples) % 10)
    blocks = (
        centres[some] + np.float32(2.5) * stream.standard_normal((len(some), 32), dtype=np.float32)
        for some in (labels[start : start + ROWS_AT_ONCE] for start in range(0, examples, ROWS_AT_ONCE))
    )
    return Read(on_disk(blocks, (examples, 32)), labels, tuple(str(number) for number in range(10)))


def _mnist1d(seed: int) -> Read:
    """Return the data set of Greydanus and Kobak (*Scaling Down Deep Learning with MNIST-1D*), drawn anew."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.seed = seed
    with _streams_kept():
        found = make_dataset(arguments)
    inputs = np.concatenate((found["x"], found["x_test"]))[:, None]
    labels = np.concatenate((found["y"], found["y_test"])).astype(np.int64)
    return Read(inputs, labels, tuple(str(digit) for digit in range(10)))


@contextmanager
def _streams_kept() -> Iterator[None]:
    """Leave Python's and numpy's global random streams as they were: the generator inside seeds them."""
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)


def _table(path: Path, spec: ExamplesSpec, learnt: Learnt | None) -> Read:
    cells = read_cells(path)
    labels = cells.column(spec.label, "data.label")
    for row, text in enumerate(labels):
        if not text:
            raise UserError(f"{cells.where(row, spec.label)}: is empty")
    others = [spec.label, *([spec.owner] if spec.owner else [])]
    features = features_of(cells, others, spec, learnt)
    owners = np.array(cells.column(spec.owner, "data.owner")) if spec.owner else None
    return Read(features.encode(cells), *_numbered(labels), owners, features)


def features_of(cells: Cells, others: Sequence[str], spec: TableSpec, learnt: Learnt | None) -> Features:
    """Return how a table's columns are read: as a model has learnt, or else as they tell.

    Args:
        cells: The table.
        others: Columns that are no features.
        spec: What somebody has said of columns.
        learnt: What a model has learnt already.
    """
    if learnt is not None and learnt.facts.get("columns"):
        return Features.of_plain(learnt.fact("columns"))
    return Features.of(cells, others, spec.columns)


def read_arrays(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Return arrays of an npz file, by name: those that are needed, and others if they are there.

    Raises:
        UserError: It can't be read, or lacks one.
    """
    with reading(f"{path}, as npz"):
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise UserError(f"{path}: holds one array, as npy; {' and '.join(needed)} are needed, as npz")
        with found as arrays:
            if set(needed) - set(arrays.files):
                raise UserError(
                    f"{path}: holds {', '.join(arrays.files)}; the arrays {' and '.join(needed)} are needed"
                )
            found = {name: arrays[name] for name in (*needed, *optional) if name in arrays.files}
    for name, array in found.items():
        if not isinstance(array, np.ndarray):  # numpy hands on as bytes what isn't written as npy
            raise UserError(f"{path}: {name} is no array; np.savez writes such files")
    return found


def _npz(path: Path, owner: str | None) -> Read:
    arrays = read_arrays(path, ["x", "y", *([owner] if owner else [])])
    inputs, labels = arrays["x"], arrays["y"]
    owners = arrays[owner].astype(str) if owner else None
    _require_arrays(path, inputs, labels)
    if owners is not None and owners.shape != labels.shape:
        raise UserError(f"{path}: {owner} {owners.shape} must be {labels.shape}, as y")
    return Read(inputs, *_numbered(labels), owners)


def _require_arrays(path: Path, inputs: np.ndarray, labels: np.ndarray) -> None:
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or not inputs.size:
        raise UserError(
            f"{path}: x {inputs.shape} and y {labels.shape} must be (N, …) and (N,), and x not empty"
        )
    if inputs.dtype.kind not in "biuf":
        raise UserError(f"{path}: x holds {inputs.dtype}; real numbers are needed")
    if not np.isfinite(inputs).all():
        raise UserError(f"{path}: x holds NaN or infinity")


def _image_folder(path: Path, size: int, *, links: bool) -> Read:
    """Return the images below each class's folder, at any depth; what is hidden is left out."""
    files = sorted(
        file
        for file in path.glob("*/**/*")
        if file.suffix.lower() in _IMAGES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.is_file()
        and (links or within(file, path))
    )
    if not files:
        raise UserError(f"{path}: holds no images in a folder a class ({', '.join(_IMAGES)})")
    inputs = np.stack([_image(file, size) for file in files])
    return Read(inputs, *_numbered([file.relative_to(path).parts[0] for file in files]))


def _image(source: Any, size: int) -> np.ndarray:
    """Return an image as (3, size, size) in [0, 1]."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UserError("images need the library Pillow: install pillow") from None
    with reading(f"{source}, as an image"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = source if isinstance(source, Image.Image) else Image.open(source)
        # Cameras store how they were held, and what shows the picture turns it.
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # sixteen bits, which Pillow would cut off at 255
            grey = Image.fromarray(np.asarray(image, dtype=np.float32) / 65535)
            pixels = np.asarray(grey.resize((size, size)), dtype=np.float32)
            return np.broadcast_to(pixels, (3, size, size)).copy()
        if image.mode == "F":
            raise UserError(f"{source}: holds real numbers, of unknown white; save it with 8 or 16 bits")
        pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32)
    return pixels.transpose(2, 0, 1) / 255


def _hugging_face(name: str, spec: ExamplesSpec) -> Read:
    where = f"data.source='hf:{name}'"
    load_dataset = import_datasets(where).load_dataset
    found = hub_call(where, lambda: load_dataset(name, split="train"))
    for column in filter(None, (spec.input, spec.label, spec.owner)):
        if column not in found.column_names:
            raise UserError(f"{where}: has no column {column}; there are {', '.join(found.column_names)}")
    values = found[spec.input]
    images = len(values) > 0 and hasattr(values[0], "convert")
    arrays = [_image(value, spec.image_size) if images else np.asarray(value).reshape(-1) for value in values]
    if len({array.shape for array in arrays}) != 1 or arrays[0].dtype.kind not in "biuf":
        raise UserError(f"{where}: column {spec.input} must hold images, or numbers, equally many a row")
    owners = np.array([str(one) for one in found[spec.owner]]) if spec.owner else None
    return Read(np.stack(arrays), *_numbered(found[spec.label]), owners)
