"""Labelled examples in memory: split, standardised, and with the training labels as the spec asks.

Everything is a function of the source, the spec and the seed, so every worker makes the same for itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossworks.data.example_sources import read_examples
from lossworks.data.learnt import Learnt, digest_of
from lossworks.data.on_disk import rows_of
from lossworks.data.standardise import Standardisation, to_float32
from lossworks.data.tables import Features
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec

_SCALED_BY = 2**20  # rows
_SPLIT, _NOISE, _IMBALANCE, _BAGS = range(4)  # what a random stream is for


class Examples:
    """Examples with what is known of each, read by row.

    Args:
        inputs: Shape (N, …), float32.
        labels: Classes (N,) int64, values (N,) float32, or sets of labels (N, P) int64 padded with -100.
        bag_size: Rows a bag, k: rows b·k to b·k + k − 1 are bag b; a bag's number is in the batch's
            ``segments``. None where there are no bags.
        further: What batches hold besides, by name, each with N rows.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        bag_size: int | None = None,
        further: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.inputs, self.labels, self.bag_size = inputs, labels, bag_size
        self.further = dict(further or {})

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, which lie in memory."""
        return sum(held.nbytes for held in (self.inputs, self.labels, *self.further.values()))

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``inputs`` (B, …), ``targets`` (B, …) and what else there is of rows (B,)."""
        index = torch.from_numpy(np.ascontiguousarray(rows))
        found = {"inputs": self.inputs[index], "targets": self.labels[index]}
        found |= {name: value[index] for name, value in self.further.items()}
        return found if self.bag_size is None else {**found, "segments": index // self.bag_size}


@dataclass(frozen=True)
class ExampleData:
    """What a classifier is trained and evaluated on.

    Attributes:
        train: With noise, imbalance and bags, if any.
        held_out: As they came, standardised alike.
        names: Of the classes, in the order of their numbers.
        owners: Whom each training example belongs to, if the source was asked.
        standardisation: What was done to the inputs, if anything.
        digest: Of what was read; empty where it is drawn or comes with a library.
        features: How the columns of a table became inputs, of one.
    """

    train: Examples
    held_out: Examples
    names: tuple[str, ...]
    owners: np.ndarray | None = None
    standardisation: Standardisation | None = None
    digest: str = ""
    features: Features | None = None

    @property
    def learnt(self) -> Learnt:
        """What a model of these data needs ever after."""
        facts = {"classes": list(self.names), **of_inputs(self.shape, self.standardisation, self.features)}
        return Learnt(facts, digest=self.digest)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example, without the axis of examples."""
        return tuple(self.train.inputs.shape[1:])


def load_examples(spec: ExamplesSpec, seed: int, learnt: Learnt | None = None) -> ExampleData:
    """Return the examples of a spec.

    Args:
        spec: The source and what is done to it.
        seed: Of the split, the noise, the imbalance and the bags.
        learnt: What a model has learnt already: its classes and scale hold, whatever these data say.

    Raises:
        UserError: The source can't be read, has too few examples of a class, or doesn't fit the model.
    """
    inputs, labels, names, owners, features = read_examples(spec, seed, learnt)
    digest = digest_of(inputs, labels, names) if spec.from_path else ""
    if learnt is not None:
        learnt.require_shape(inputs.shape[1:])
        labels = learnt.numbers_of(names, "classes")[labels]
        names = tuple(map(str, learnt.fact("classes")))
    held_out = _held_out(labels, spec.held_out_fraction, seed, names)
    train = np.flatnonzero(~held_out)
    train = train[_kept(labels[train], spec.imbalance, len(names), seed)]
    # What is on disk is drawn, all rows alike, and its scale that of the first as well as of all.
    known = train[:_SCALED_BY] if isinstance(inputs, np.memmap) else train
    standardise = scale_of(spec.standardise, np.asarray(inputs[known]), learnt)

    def scaled(some: np.ndarray) -> np.ndarray:
        return to_float32(standardise(some) if standardise else some)

    noisy = with_label_noise(labels[train], spec.label_noise, len(names), seed)
    dealt = in_bags(len(train), spec.bag_size, seed)
    bags = spec.bag_size if spec.bag_size > 1 else None
    return ExampleData(
        Examples(
            torch.from_numpy(rows_of(inputs, train[dealt], scaled)), torch.from_numpy(noisy[dealt]), bags
        ),
        # Held-out examples are measured one by one, each a bag of its own.
        Examples(torch.from_numpy(scaled(inputs[held_out])), torch.from_numpy(labels[held_out]), bags and 1),
        names,
        None if owners is None else owners[train][dealt],
        standardise,
        digest,
        features,
    )


def of_inputs(
    shape: tuple[int, ...], scale: Standardisation | None, features: Features | None
) -> dict[str, Any]:
    """Return how inputs are read, as facts: their shape, their scale, and the columns that they come from."""
    return {
        "shape": list(shape),
        "standardisation": None if scale is None else scale.plain(),
        "columns": None if features is None else features.plain(),
    }


def scale_of(wanted: bool, training: np.ndarray, learnt: Learnt | None) -> Standardisation | None:
    """Return the scale that a model has learnt, or else that of training examples (M, …), if it is wanted."""
    if learnt is not None:
        return Standardisation.of_facts(learnt.facts)
    if not wanted and np.isnan(training).any():
        raise UserError("data.standardise=false: cells are empty, and the mean that stands in needs true")
    return Standardisation.of(training) if wanted else None


def standardised(inputs: np.ndarray, training: np.ndarray) -> np.ndarray:
    """Return inputs (N, …) with the mean 0 and deviation 1 of the training part (M, …), float64."""
    return Standardisation.of(training)(inputs)


def with_label_noise(labels: np.ndarray, share: float, classes: int, seed: int) -> np.ndarray:
    """Return labels (N,) of which a share was drawn anew from all classes, the true one among them."""
    stream = np.random.default_rng([seed, _NOISE])
    chosen = stream.random(len(labels)) < share
    return np.where(chosen, stream.integers(0, classes, len(labels)), labels)


def _held_out(labels: np.ndarray, share: float, seed: int, names: tuple[str, ...]) -> np.ndarray:
    """Return which examples are held out: of each class the same share, at least one and not all."""
    stream = np.random.default_rng([seed, _SPLIT])
    chosen = np.zeros(len(labels), dtype=bool)
    for label, name in enumerate(names):
        rows = stream.permutation(np.flatnonzero(labels == label))
        if not len(rows):
            continue  # of the model's classes, but not among these data
        if len(rows) < 2:
            raise UserError(
                f"data.source: class {name!r} has one example; two are the least: one is held out"
                + ("; for numbers use task: regression" if re.fullmatch(r"[-+]?[\d.,]+", name) else "")
            )
        chosen[rows[: min(len(rows) - 1, max(1, round(share * len(rows))))]] = True
    return chosen


def _kept(labels: np.ndarray, ratio: float, classes: int, seed: int) -> np.ndarray:
    """Return the rows that stay so that class sizes fall geometrically to 1/ratio of the first, sorted."""
    stream = np.random.default_rng([seed, _IMBALANCE])
    sizes = np.bincount(labels, minlength=classes)
    kept = []
    for label in range(classes):
        rows = stream.permutation(np.flatnonzero(labels == label))
        fraction = ratio ** (-label / max(1, classes - 1))
        kept.append(rows[: max(1, min(len(rows), round(sizes.max() * fraction)))] if ratio > 1 else rows)
    return np.sort(np.concatenate(kept))


def in_bags(examples: int, size: int, seed: int) -> np.ndarray:
    """Return rows in an order in which each ``size`` are a bag, dealt at random; what fills none is left out.

    Without bags the rows stay as they are.
    """
    if size == 1:
        return np.arange(examples)
    if examples < size:
        raise UserError(f"data.bag_size={size}: there are only {examples} training examples")
    return np.random.default_rng([seed, _BAGS]).permutation(examples)[: examples // size * size]
