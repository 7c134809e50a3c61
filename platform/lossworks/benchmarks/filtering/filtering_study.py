"""The small language model of ``lossworks bench filtering``: trained, looked at, and judged."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossworks import linear_cross_entropy
from lossworks.benchmarks.filtering.filtered_gradients import (
    FilteredGradients,
    TileFiltered,
    errors,
    exact_gradients,
    library_gradients,
    rounded_gradients,
    tile_gradients,
)
from lossworks.data import SequenceOrder, TokenizedCorpus, prepare
from lossworks.data.batch import Batch
from lossworks.models import LanguageModel, ModelObjective, Outputs, build_model
from lossworks.training.optimizer import build_optimizers, set_lr
from lossworks.training.schedule import lr_factor

if TYPE_CHECKING:
    from lossworks.benchmarks.filtering.filtering import FilteringMethod, FilteringSpec

# Held-out sequences that are evaluated at once.
_AT_ONCE = 32


class State(NamedTuple):
    """What the head gets at a step.

    Attributes:
        step: Steps done.
        e: Held-out hidden states, shape (N, D).
        c: The head's matrix, shape (V, D).
        targets: Shape (N,).
        exact: The gradients, in float64.
    """

    step: int
    e: Tensor
    c: Tensor
    targets: Tensor
    exact: FilteredGradients

    @property
    def loss(self) -> float:
        """The held-out loss in nats a token."""
        return float(self.exact.loss) / len(self.e)


class Losses(NamedTuple):
    """Held-out losses in nats a token: of all tokens, and of those whose class is rare."""

    all: float
    rare: float


class Study:
    """A corpus, and the model that every run starts from.

    Attributes:
        spec: What to compare.
        classes: V.
        rare: Which classes lie outside the fewest that cover ``spec.frequent_share`` of the training tokens,
            shape (V,).
    """

    def __init__(self, spec: "FilteringSpec") -> None:
        torch.set_num_threads(spec.threads)
        self.spec = spec
        corpus = TokenizedCorpus.open(prepare(spec.data).folder)
        self._text, self._held_out = corpus.split(spec.data)
        self.classes = corpus.vocab_size
        tokens = corpus.read(0, len(self._text) * spec.data.sequence_length)
        self.rare = rare_classes(np.bincount(tokens, minlength=self.classes), spec.frequent_share)

    def states(self) -> Iterator[State]:
        """Train exactly, and yield what the head gets at each step of ``spec.states_steps``."""
        steps = sorted(set(self.spec.states_steps))
        tokens, targets = self._held_out.batch(self._spaced(self.spec.states_sequences)).values()
        for done, model in self._trained(_exact, max(steps), seed=0):
            if done not in steps:
                continue
            with torch.no_grad():
                e = model.hidden(tokens).flatten(0, -2)
            c, y = model.head().weight.detach().clone(), targets.flatten()
            yield State(done, e, c, y, exact_gradients(e, c, y))

    def errors(self, state: State, method: "FilteringMethod") -> list[tuple[str, float, str]]:
        """Return metric, value and unit of the errors that a method makes at a state."""
        e, c, y, eps = state.e, state.c, state.targets, method.eps
        repair = method.name.endswith("repaired")
        if eps is None:
            made = rounded_gradients(e, c, y)
        elif method.name.startswith("columns"):
            made = library_gradients(e, c, y, eps, repair=repair)
        else:
            made = tile_gradients(e.double(), c.double(), y, eps, repair=repair)
        return errors(made, state.exact, self.rare)

    def train(self, method: "FilteringMethod", seed: int) -> Losses:
        """Train from scratch with a method and return the held-out losses; nothing else depends on it."""
        for done, model in self._trained(objective(method), self.spec.steps, seed):
            if done == self.spec.steps:
                return self._losses(model)
        raise AssertionError("the last step is always reached")

    def _trained(
        self, objective: ModelObjective, steps: int, seed: int
    ) -> Iterator[tuple[int, LanguageModel]]:
        """Yield the steps done and the model, before the first step and after each."""
        spec = self.spec
        model = build_model(spec.model, vocab_size=self.classes, seed=seed)
        optimizers = build_optimizers(model, spec.optimizer)
        order = SequenceOrder(len(self._text), spec.batch_size, seed)
        yield 0, model
        for step in range(1, steps + 1):
            set_lr(optimizers, lr_factor(spec.schedule, step=step, steps=steps))
            batch = self._text.batch(order.rows((step - 1) * spec.batch_size, 0, 1))
            (model(batch, objective) / batch["targets"].numel()).backward()
            if spec.optimizer.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            yield step, model

    @torch.no_grad()
    def _losses(self, model: LanguageModel) -> Losses:
        made, rare = [], []
        rows = self._spaced(self.spec.held_out_sequences)
        for start in range(0, len(rows), _AT_ONCE):
            tokens, targets = self._held_out.batch(rows[start : start + _AT_ONCE]).values()
            loss = linear_cross_entropy(model.hidden(tokens), model.head().weight, targets, reduction="none")
            made.append(loss.double().flatten())  # type: ignore[union-attr]  # one tensor
            rare.append(self.rare[targets].flatten())
        losses = torch.cat(made)
        return Losses(float(losses.mean()), float(losses[torch.cat(rare)].mean()))

    def _spaced(self, count: int) -> np.ndarray:
        """Return evenly spaced held-out sequences: neighbours would come from one document."""
        count = min(count, len(self._held_out))
        return np.arange(count) * len(self._held_out) // count


def rare_classes(counts: np.ndarray, share: float) -> Tensor:
    """Return which classes lie outside the fewest that make up ``share`` of all counts, shape (V,)."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    rare = np.empty(len(counts), dtype=bool)
    rare[order] = before >= share * counts.sum()
    return torch.from_numpy(rare)


def objective(method: "FilteringMethod") -> ModelObjective:
    """Return the summed loss with a method's gradient."""
    if method.name == "exact":
        return _exact
    if method.name == "bf16":
        return _bf16
    repair = method.name.endswith("repaired")
    make = _columns if method.name.startswith("columns") else _tiles
    return make(method.eps or 0.0, repair=repair)


def _exact(outputs: Outputs, batch: Batch) -> Tensor:
    return linear_cross_entropy(  # type: ignore[return-value]
        outputs.hidden, _weight(outputs), batch["targets"], reduction="sum"
    )


def _weight(outputs: Outputs) -> Tensor:
    if outputs.head is None:
        raise ValueError("language models have a head")
    return outputs.head.weight


def _bf16(outputs: Outputs, batch: Batch) -> Tensor:
    e, c = outputs.hidden.bfloat16(), _weight(outputs).bfloat16()
    return linear_cross_entropy(e, c, batch["targets"], reduction="sum")  # type: ignore[return-value]


def _columns(eps: float, *, repair: bool) -> ModelObjective:
    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        e, c, y = outputs.hidden, _weight(outputs), batch["targets"]
        return linear_cross_entropy(  # type: ignore[return-value]
            e, c, y, reduction="sum", filter_eps=eps, filter_repair=repair
        )

    return loss


def _tiles(eps: float, *, repair: bool) -> ModelObjective:
    def loss(outputs: Outputs, batch: Batch) -> Tensor:
        e, y = outputs.hidden.flatten(0, -2), batch["targets"].flatten()
        value: Tensor = TileFiltered.apply(e, _weight(outputs), y, eps, repair)
        return value

    return loss
