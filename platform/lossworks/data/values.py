"""Examples with real targets: a table, or the transitions of a Markov chain with rewards."""

import re
from dataclasses import dataclass

import numpy as np
import torch

from lossworks.data.example_sources import existing_file, features_of, read_arrays
from lossworks.data.examples import Examples, in_bags, of_inputs, scale_of
from lossworks.data.learnt import Learnt, digest_of
from lossworks.data.standardise import Standardisation, to_float32
from lossworks.data.tables import Features, read_cells
from lossworks.errors import UserError
from lossworks.specs.tasks.values import ValuesSpec

_SPLIT, _OUTLIERS, _CHAIN, _LINEAR = range(4)  # what a random stream is for
_STATES, _FEATURES, _SUCCESSORS = 100, 16, 4  # of a chain
_DIMENSIONS = 100  # of a linear function
_CLASSES = 50  # different words of a label that look like names of classes


@dataclass(frozen=True, eq=False)
class ValueData:
    """What a regression is trained and evaluated on.

    Attributes:
        train: Its targets are on the scale that is trained on.
        held_out: The same scale.
        mean: Of the training targets, in their own unit; 0 where they aren't standardised.
        deviation: Of the training targets; 1 where they aren't standardised.
        standardisation: What was done to the inputs, if anything.
        digest: Of what was read; empty where it is drawn or comes with a library.
        features: How the columns of a table became inputs, of one.
    """

    train: Examples
    held_out: Examples
    mean: float = 0.0
    deviation: float = 1.0
    standardisation: Standardisation | None = None
    digest: str = ""
    features: Features | None = None

    @property
    def learnt(self) -> Learnt:
        """What a model of these data needs ever after."""
        target = {"mean": self.mean, "deviation": self.deviation}
        facts = {"target": target, **of_inputs(self.shape, self.standardisation, self.features)}
        return Learnt(facts, digest=self.digest)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.inputs.shape[1:])


def load_values(spec: ValuesSpec, seed: int, learnt: Learnt | None = None) -> ValueData:
    """Return the examples of a spec.

    Args:
        spec: The source and what is done to it.
        seed: Of the split, of outliers, of bags, and of sources that are drawn.
        learnt: What a model has learnt already: its scales hold, whatever these data say.

    Raises:
        UserError: The source can't be read, or doesn't fit the model.
    """
    if spec.of_chain:
        return _chain(int(spec.source.partition(":")[2]), spec, seed)
    inputs, targets, features = _read(spec, seed, learnt)
    if learnt is not None:
        learnt.require_shape(inputs.shape[1:])
    held_out = split(len(targets), spec.held_out_fraction, seed)
    if (targets == targets[0]).all():
        count, value = len(targets), targets[0]
        raise UserError(f"data.label: all {count} targets are {value:g}; there is nothing to learn")
    train = np.flatnonzero(~held_out)
    scale = scale_of(spec.standardise, inputs[train], learnt)
    x = to_float32(scale(inputs) if scale else inputs)
    mean, deviation = 0.0, 1.0
    if learnt is not None:
        mean, deviation = (float(learnt.fact("target")[name]) for name in ("mean", "deviation"))
    elif spec.standardise_targets:
        mean, deviation = float(targets[train].mean()), float(targets[train].std()) or 1.0
    y = to_float32((targets - mean) / deviation)
    dealt = in_bags(len(train), spec.bag_size, seed)
    bags = spec.bag_size if spec.bag_size > 1 else None
    own = with_outliers(y[train], spec.outliers, seed)[dealt]
    return ValueData(
        Examples(torch.from_numpy(x[train][dealt]), torch.from_numpy(own), bags),
        Examples(torch.from_numpy(x[held_out]), torch.from_numpy(y[held_out]), bags and 1),
        mean,
        deviation,
        scale,
        digest_of(inputs, targets) if spec.from_path else "",
        features,
    )


def split(examples: int, share: float, seed: int) -> np.ndarray:
    """Return which examples are held out, bool (N,): a share of them, at least one and not all.

    Raises:
        UserError: There are fewer than two.
    """
    if examples < 2:
        raise UserError(f"data.source: holds {examples} example; two are the least: one is held out")
    count = min(examples - 1, max(1, round(share * examples)))
    chosen = np.zeros(examples, dtype=bool)
    chosen[np.random.default_rng([seed, _SPLIT]).permutation(examples)[:count]] = True
    return chosen


def with_outliers(targets: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return targets (N,) of which a share was put ten of their deviations away, up or down."""
    stream = np.random.default_rng([seed, _OUTLIERS])
    chosen = stream.random(len(targets)) < share
    signs = np.where(stream.random(len(targets)) < 0.5, -1.0, 1.0)
    moved: np.ndarray = np.where(chosen, targets + 10 * targets.std() * signs, targets)
    return moved.astype(np.float32)


def _read(
    spec: ValuesSpec, seed: int, learnt: Learnt | None
) -> tuple[np.ndarray, np.ndarray, Features | None]:
    """Return inputs (N, …) and targets (N,), float64, and how a table's columns became inputs."""
    kind, _, name = spec.source.partition(":")
    if kind in ("csv", "parquet"):
        cells = read_cells(existing_file(name))
        cells.column(spec.label, "data.label")
        try:
            targets = cells.numbers(spec.label)
        except UserError as error:
            words = {text for text in cells.columns[spec.label] if not re.search(r"\d", text)}
            hint = "; for classes use task: classification" if 1 < len(words) <= _CLASSES else ""
            raise UserError(f"{error}{hint}") from None
        if np.isnan(targets).any():
            row = int(np.flatnonzero(np.isnan(targets))[0])
            raise UserError(f"{cells.where(row, spec.label)}: is empty")
        features = features_of(cells, [spec.label], spec, learnt)
        return features.encode(cells), targets, features
    return (*_numbers(kind, name, seed), None)


def _numbers(kind: str, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if kind == "npz":
        return _arrays(name)
    if kind == "linear":
        return _linear(int(name), seed)
    from sklearn import datasets

    if kind == "friedman":
        found = datasets.make_friedman1(int(name), noise=1.0, random_state=seed)
        return found[0], found[1]
    found = datasets.load_diabetes()
    return found.data, found.target


def _linear(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return y = ⟨θ, x⟩ + ε of x ~ N(0, I) in a hundred dimensions, ‖θ‖ = 1 and ε ~ N(0, 1)."""
    stream = np.random.default_rng([seed, _LINEAR])
    x = stream.standard_normal((count, _DIMENSIONS))
    theta = stream.standard_normal(_DIMENSIONS)
    return x, x @ theta / np.linalg.norm(theta) + stream.standard_normal(count)


def _arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    found = read_arrays(existing_file(name), ["x", "y"])
    x, y = found["x"], found["y"]
    if (
        x.ndim < 2
        or y.ndim != 1
        or len(x) != len(y)
        or x.dtype.kind not in "biuf"
        or y.dtype.kind not in "biuf"
    ):
        raise UserError(f"{name}: x {x.shape} and y {y.shape} must be numbers, (N, …) and (N,)")
    if not x.size:
        raise UserError(f"{name}: x {x.shape} holds nothing")
    for what, array in (("x", x), ("y", y)):
        if not np.isfinite(array).all():
            raise UserError(f"{name}: {what} holds NaN or infinity")
    return x, y.astype(np.float64)


def _chain(transitions: int, spec: ValuesSpec, seed: int) -> ValueData:
    """Return transitions of a chain of a hundred states to train on, and the states' true values held out.

    A state has sixteen features and four successors; its reward is a wave over its features, with noise in
    training. The values solve v = r + γ·P·v.
    """
    stream = np.random.default_rng([seed, _CHAIN])
    features = stream.standard_normal((_STATES, _FEATURES))
    follows = stream.integers(0, _STATES, (_STATES, _SUCCESSORS))
    rewards = np.sin(features @ stream.standard_normal(_FEATURES))
    chance = np.zeros((_STATES, _STATES))
    np.add.at(chance, (np.arange(_STATES)[:, None], follows), 1 / _SUCCESSORS)
    values = np.linalg.solve(np.eye(_STATES) - spec.discount * chance, rewards)
    at = stream.integers(0, _STATES, transitions)
    then = follows[at, stream.integers(0, _SUCCESSORS, transitions)]
    noisy = rewards[at] + stream.standard_normal(transitions)
    scale = Standardisation.of(features[at]) if spec.standardise else None
    x = torch.from_numpy(to_float32(scale(features) if scale else features))
    discounts = torch.full((transitions,), spec.discount)
    return ValueData(
        Examples(
            x[at],
            torch.from_numpy(to_float32(noisy)),
            further={"next_inputs": x[then], "discounts": discounts},
        ),
        # A true value is a reward after which nothing follows.
        Examples(
            x,
            torch.from_numpy(to_float32(values)),
            further={"next_inputs": x, "discounts": torch.zeros(_STATES)},
        ),
        standardisation=scale,
    )
