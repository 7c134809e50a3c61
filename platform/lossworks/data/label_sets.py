"""Examples with a set of labels each, kept as padded lists of numbers and never as a matrix of all labels."""

from dataclasses import dataclass

import numpy as np
import torch

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.example_sources import existing_file, features_of, in_order, read_arrays
from lossworks.data.examples import Examples, of_inputs, scale_of
from lossworks.data.learnt import Learnt, digest_of
from lossworks.data.standardise import Standardisation, to_float32
from lossworks.data.tables import Features, read_cells
from lossworks.data.values import split
from lossworks.errors import UserError
from lossworks.specs.tasks.values import LabelSetsSpec

_TOPICS = 1  # what a random stream is for
_FEATURES, _RANK, _BEST, _NOISE = 32, 24, 5, 0.5
_ROWS_AT_ONCE = 1024
_MANY, _MANY_UNUSED = 10_000, 100  # labels, and for each that is used, of which most seem to be a mistake


@dataclass(frozen=True, eq=False)
class LabelSetData:
    """What a multi-label model is trained and evaluated on.

    Attributes:
        train: Targets are labels (N, P) int64, padded with -100.
        held_out: The same.
        names: Of the L labels.
        standardisation: What was done to the inputs, if anything.
        digest: Of what was read; empty where it is drawn.
        features: How the columns of a table became inputs, of one.
    """

    train: Examples
    held_out: Examples
    names: tuple[str, ...]
    standardisation: Standardisation | None = None
    digest: str = ""
    features: Features | None = None

    @property
    def learnt(self) -> Learnt:
        """What a model of these data needs ever after."""
        facts = {"names": list(self.names), **of_inputs(self.shape, self.standardisation, self.features)}
        return Learnt(facts, digest=self.digest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.inputs.shape[1:])


def load_label_sets(spec: LabelSetsSpec, seed: int, learnt: Learnt | None = None) -> LabelSetData:
    """Return the examples of a spec.

    Args:
        spec: The source.
        seed: Of the split, and of sources that are drawn.
        learnt: What a model has learnt already: its labels and scale hold, whatever these data say.

    Raises:
        UserError: The source can't be read, or doesn't fit the model.
    """
    inputs, labels, names, features = _read(spec, seed, learnt)
    digest = digest_of(inputs, labels, names) if spec.from_path else ""
    if learnt is not None:
        learnt.require_shape(inputs.shape[1:])
        # One more entry, to which the padding's number leads.
        numbers = np.append(learnt.numbers_of(names, "names"), IGNORE_INDEX)
        labels = numbers[np.where(labels < 0, len(names), labels)]
        names = tuple(map(str, learnt.fact("names")))
    held_out = split(len(labels), spec.held_out_fraction, seed)
    scale = scale_of(spec.standardise, inputs[~held_out], learnt)
    x, y = torch.from_numpy(to_float32(scale(inputs) if scale else inputs)), torch.from_numpy(labels)
    chosen = torch.from_numpy(held_out)
    train, test = (Examples(x[part], y[part]) for part in (~chosen, chosen))
    return LabelSetData(train, test, names, scale, digest, features)


def _read(
    spec: LabelSetsSpec, seed: int, learnt: Learnt | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], Features | None]:
    """Return inputs (N, …), labels (N, P) int64, the labels' names, and how a table's columns are read."""
    kind, _, name = spec.source.partition(":")
    if kind in ("csv", "parquet"):
        return _table(name, spec, learnt)
    return (*(_arrays(name) if kind == "npz" else _topics(int(name), spec.labels, seed)), None)


def _table(
    name: str, spec: LabelSetsSpec, learnt: Learnt | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], Features]:
    cells = read_cells(existing_file(name))
    texts = cells.column(spec.label, "data.label")
    parts = [[part.strip() for part in text.split(spec.separator) if part.strip()] for text in texts]
    sets = [list(dict.fromkeys(one)) for one in parts]  # a label that is named twice is there once
    names = sorted({part for one in sets for part in one})
    names = [names[at] for at in in_order(np.array(names))]
    if len(names) < 2:
        raise UserError(f"{name}: column {spec.label} must hold at least two labels, not {len(names)}")
    numbers = {label: number for number, label in enumerate(names)}
    features = features_of(cells, [spec.label], spec, learnt)
    labels = padded([[numbers[part] for part in one] for one in sets])
    return features.encode(cells), labels, tuple(names), features


def padded(sets: list[list[int]]) -> np.ndarray:
    """Return lists of labels as one array (N, P) int64, padded with -100."""
    width = max(1, max(map(len, sets), default=1))
    found = np.full((len(sets), width), IGNORE_INDEX, dtype=np.int64)
    for row, one in enumerate(sets):
        found[row, : len(one)] = one
    return found


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    found = read_arrays(existing_file(name), ["x", "y"])
    x, y = found["x"], found["y"]
    if (
        x.ndim < 2
        or y.ndim != 2
        or len(x) != len(y)
        or y.dtype.kind not in "biu"
        or x.dtype.kind not in "biuf"
    ):
        raise UserError(f"{name}: x {x.shape} and y {y.shape} must be numbers (N, …) and integers (N, P)")
    if not np.isfinite(x).all():
        raise UserError(f"{name}: x holds NaN or infinity")
    # Lists of two labels without padding would all be the same set.
    if y.dtype.kind == "b" or (y.shape[1] >= 2 and set(np.unique(y)) <= {0, 1}):
        count, labels = y.shape[1], padded([np.flatnonzero(row).tolist() for row in y])
    else:
        count, labels = int(y.max()) + 1, np.where(y < 0, IGNORE_INDEX, y).astype(np.int64)
    used = len(np.unique(labels[labels >= 0]))
    if used < 2:
        raise UserError(f"{name}: y must hold at least two labels, not {used}")
    if count > _MANY and count > _MANY_UNUSED * used:
        raise UserError(
            f"{name}: y holds the label {count - 1}, and only {used} different ones; number them from 0 on"
        )
    return x, labels, tuple(str(number) for number in range(count))


def _topics(rows: int, labels: int, seed: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return points (N, 32) with the five labels (N, 5) that a random map of rank 24, with noise, puts first.

    The map is the same for all seeds; the points and the noise are not.
    """
    fixed = np.random.default_rng(_TOPICS)
    into, out = fixed.standard_normal((_FEATURES, _RANK)), fixed.standard_normal((_RANK, labels))
    stream = np.random.default_rng([seed, _TOPICS])
    points = stream.standard_normal((rows, _FEATURES))
    best = np.empty((rows, min(_BEST, labels)), dtype=np.int64)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scores = points[part] @ into @ out / np.sqrt(_FEATURES * _RANK)
        scores += _NOISE * stream.standard_normal(scores.shape)
        best[part] = np.argpartition(-scores, best.shape[1] - 1, axis=1)[:, : best.shape[1]]
    return points, best, tuple(str(number) for number in range(labels))
