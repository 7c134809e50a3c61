"""Where labelled examples come from: every source gives inputs (N, …), labels (N,) and the classes' names."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec

Read = tuple[np.ndarray, np.ndarray, tuple[str, ...]]
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def read_examples(spec: ExamplesSpec, seed: int) -> Read:
    """Return inputs (N, …) of floats, labels (N,) int64 in [0, K) and the K names.

    Args:
        spec: Names the source.
        seed: Of sources that are drawn.

    Raises:
        UserError: The source can't be read.
    """
    kind, _, name = spec.source.partition(":")
    match kind:
        case "csv":
            return _csv(_existing(Path(name).expanduser()), spec.label)
        case "npz":
            return _npz(_existing(Path(name).expanduser()))
        case "imagefolder":
            return _image_folder(_existing(Path(name).expanduser()), spec.image_size)
        case "hf":
            return _hugging_face(name, spec)
        case "mnist1d":
            return _mnist1d(seed)
        case _:
            return _scikit_learn(kind)


def numbered(labels: Any) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels as numbers in the order of their sorted names, and the names.

    Raises:
        UserError: There are fewer than two classes.
    """
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"the labels hold {len(names)} class; two are the least")
    return numbers.reshape(-1).astype(np.int64), tuple(str(name) for name in names)


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"data.source: {path}: no such file or folder")
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
    return inputs, found.target.astype(np.int64), tuple(str(label) for label in found.target_names)


def _mnist1d(seed: int) -> Read:
    """Return the data set of Greydanus and Kobak (*Scaling Down Deep Learning with MNIST-1D*), drawn anew."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.seed = seed
    found = make_dataset(arguments)
    inputs = np.concatenate((found["x"], found["x_test"]))[:, None]
    labels = np.concatenate((found["y"], found["y_test"])).astype(np.int64)
    return inputs, labels, tuple(str(digit) for digit in range(10))


def _csv(path: Path, label: str) -> Read:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        columns = list(reader.fieldnames or ())
        if label not in columns:
            raise UserError(
                f"{path}: data.label={label} is no column; there are {', '.join(columns) or 'none'}"
            )
        rows = list(reader)
    features = [name for name in columns if name != label]
    if not features or not rows:
        raise UserError(
            f"{path}: holds {len(rows)} rows of {len(features)} features; both must be at least 1"
        )
    inputs = np.empty((len(rows), len(features)))
    for number, row in enumerate(rows):
        inputs[number] = [
            _number(row[name], f"{path}, line {number + 2}, column {name}") for name in features
        ]
    return inputs, *numbered([row[label] for row in rows])


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{where}: {text!r} is no finite number")
    return value


def _npz(path: Path) -> Read:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = {"x", "y"} - set(arrays.files)
            if missing:
                raise UserError(f"{path}: holds {', '.join(arrays.files)}; the arrays x and y are needed")
            inputs, labels = arrays["x"], arrays["y"]
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: can't be read as npz: {error}") from None
    if len(inputs) != len(labels) or labels.ndim != 1 or inputs.ndim < 2:
        raise UserError(f"{path}: x {inputs.shape} and y {labels.shape} must be (N, …) and (N,)")
    if not np.isfinite(inputs).all():
        raise UserError(f"{path}: x holds NaN or infinity")
    return inputs, *numbered(labels)


def _image_folder(path: Path, size: int) -> Read:
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in _IMAGES)
    if not files:
        raise UserError(f"{path}: holds no images in a folder a class ({', '.join(_IMAGES)})")
    inputs = np.stack([_image(file, size) for file in files])
    return inputs, *numbered([file.parent.name for file in files])


def _image(source: Any, size: int) -> np.ndarray:
    """Return an image as (3, size, size) in [0, 1]."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32)
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"{source}: can't be read as an image: {error}") from None
    return pixels.transpose(2, 0, 1) / 255


def _hugging_face(name: str, spec: ExamplesSpec) -> Read:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(f"data.source=hf:{name} needs the datasets library: install lossworks[hf]") from None
    found = load_dataset(name, split="train")
    for column in (spec.input, spec.label):
        if column not in found.column_names:
            raise UserError(f"hf:{name}: has no column {column}; there are {', '.join(found.column_names)}")
    values = found[spec.input]
    images = hasattr(values[0], "convert")
    inputs = np.stack([_image(value, spec.image_size) if images else np.asarray(value) for value in values])
    return inputs, *numbered(found[spec.label])
