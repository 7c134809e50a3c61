"""Where labelled examples come from: every source gives inputs (N, …), labels (N,) and the classes' names."""

import csv
import random
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lossworks.data.text.readers import hub_call, import_datasets
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Read(NamedTuple):
    """What a source gives.

    Attributes:
        inputs: Shape (N, …), numbers.
        labels: Shape (N,), int64 in [0, K).
        names: Of the K classes.
        owners: Whom each example belongs to, texts of shape (N,), or None if nobody asked.
    """

    inputs: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]
    owners: np.ndarray | None = None


def read_examples(spec: ExamplesSpec, seed: int) -> Read:
    """Return the examples of a source.

    Args:
        spec: Names the source.
        seed: Of sources that are drawn.

    Raises:
        UserError: The source can't be read.
    """
    found = _read(spec, seed)
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
    return Read(found.inputs[rows], numbers[rows].astype(np.int64), tuple(kept), owners)


def _read(spec: ExamplesSpec, seed: int) -> Read:
    kind, _, name = spec.source.partition(":")
    match kind:
        case "csv":
            return _csv(existing_file(name), spec.label, spec.owner)
        case "npz":
            return _npz(existing_file(name), spec.owner)
        case "imagefolder":
            return _image_folder(_folder(name), spec.image_size)
        case "hf":
            return _hugging_face(name, spec)
        case "blobs" | "mnist1d":
            return _blobs(int(name), seed) if kind == "blobs" else _mnist1d(seed)
        case _:
            return _scikit_learn(kind)


def _numbered(labels: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels as numbers in the order of their sorted names, and the names.

    Raises:
        UserError: There are fewer than two classes, or a label is NaN.
    """
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    if names.dtype.kind == "f" and not np.isfinite(names).all():
        raise UserError("a label is NaN or infinite")
    if len(names) < 2:
        raise UserError(f"the labels hold {len(names)} class; two are the least")
    return numbers.reshape(-1).astype(np.int64), tuple(str(name) for name in names)


def existing_file(name: str) -> Path:
    """Return the file that ``data.source`` names.

    Raises:
        UserError: There is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"data.source: {path}: {'is no file' if path.exists() else 'no such file'}")
    return path


def _folder(name: str) -> Path:
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
    """Return points around 10 centres in 32 dimensions, which no classifier tells apart without errors."""
    from sklearn.datasets import make_blobs

    inputs, labels = make_blobs(
        examples, n_features=32, centers=10, cluster_std=2.5, center_box=(-1.5, 1.5), random_state=seed
    )
    return Read(inputs, labels.astype(np.int64), tuple(str(number) for number in range(10)))


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


def _csv(path: Path, label: str, owner: str | None) -> Read:
    table = read_table(path, label, owner)
    return Read(table.inputs, *_numbered(table.labels), table.owners)


class ExampleTable(NamedTuple):
    """A csv file with numeric features.

    Attributes:
        inputs: Shape (N, F), float64.
        labels: What stands in the label's column, N texts.
        lines: The line of each row, for messages.
        owners: What stands in the owner's column, texts (N,), or None if nobody asked.
    """

    inputs: np.ndarray
    labels: list[str]
    lines: list[int]
    owners: np.ndarray | None = None


def read_table(path: Path, label: str, owner: str | None = None) -> ExampleTable:
    """Return a csv file; every column but label and owner is a feature.

    Raises:
        UserError: It can't be read, lacks a column, or a feature is no finite number; with line and column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            columns = next(reader, [])
            _require_columns(path, columns, label, owner)
            # The reader's count of lines is right where fields span lines, and where lines are empty.
            rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: can't be read as csv: {error}") from None
    if not rows:
        raise UserError(f"{path}: holds no rows below its header")
    at = columns.index(label)
    for line, row in rows:
        if len(row) != len(columns):
            raise UserError(f"{path}, line {line}: holds {len(row)} values for {len(columns)} columns")
        if not row[at].strip():
            raise UserError(f"{path}, line {line}, column {label}: is empty")
    others = {at} if owner is None else {at, columns.index(owner)}
    features = [index for index in range(len(columns)) if index not in others]
    inputs = [
        [finite_number(row[index], f"{path}, line {line}, column {columns[index]}") for index in features]
        for line, row in rows
    ]
    owners = None if owner is None else np.array([row[columns.index(owner)] for _, row in rows])
    return ExampleTable(np.array(inputs), [row[at] for _, row in rows], [line for line, _ in rows], owners)


def _require_columns(path: Path, columns: list[str], label: str, owner: str | None) -> None:
    for field, name in (("label", label), ("owner", owner)):
        if name is not None and name not in columns:
            there = ", ".join(columns) or "none"
            raise UserError(f"{path}: data.{field}={name} is no column; there are {there}")
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header names {', '.join(twice)} more than once")
    if len(columns) <= len({label, owner or label}):
        raise UserError(f"{path}: has no feature beside {label}")


def finite_number(text: str, where: str) -> float:
    """Return the number in a text.

    Raises:
        UserError: It is none, or not finite; naming where it stands.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{where}: {text!r} is no finite number")
    return value


def read_arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    """Return arrays of an npz file, by name.

    Raises:
        UserError: It can't be read, or lacks one.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if set(needed) - set(arrays.files):
                raise UserError(
                    f"{path}: holds {', '.join(arrays.files)}; the arrays {' and '.join(needed)} are needed"
                )
            return {name: arrays[name] for name in needed}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: can't be read as npz: {error}") from None


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


def _image_folder(path: Path, size: int) -> Read:
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in _IMAGES)
    if not files:
        raise UserError(f"{path}: holds no images in a folder a class ({', '.join(_IMAGES)})")
    inputs = np.stack([_image(file, size) for file in files])
    return Read(inputs, *_numbered([file.parent.name for file in files]))


def _image(source: Any, size: int) -> np.ndarray:
    """Return an image as (3, size, size) in [0, 1]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("images need the library Pillow: install pillow") from None
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{source}: can't be read as an image: {error}") from None
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
