"""Training of sentences that are written at once: a word for every place, from targets that were edited.

B rows, T words a sentence, V words in all, D features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.examples import Examples
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.models import HeadedModel, Outputs
from lossworks.models.folders import write_model
from lossworks.models.interface import Head
from lossworks.models.operations import count_step_flops
from lossworks.specs import ModelTrackingSpec, RunSpec
from lossworks.specs.base import Spec
from lossworks.tasks.examples import require_small
from lossworks.tasks.interface import Mode, Prepared, Say, Task, as_sums

FORMAT, FORMAT_VERSION = "lossworks-sentences", 1
BLANK = 0
"""The word that stands where one was blanked; no sentence has it."""

_CLEAN, _EDITS = range(2)  # what a random stream is for


class SentencesDataSpec(Spec):
    """Random sentences, and how the copies of them that are trained on were edited."""

    sentences: int = Field(40, ge=1, le=10**6, description="sentences to learn, S")
    length: int = Field(8, ge=2, le=4096, description="words a sentence, T")
    words: int = Field(50, ge=2, le=10**6, description="words in all, V; the first stands for a blank")
    copies: int = Field(100, ge=1, le=10**5, description="copies of each sentence in the training data")
    edits: float = Field(
        0.4,
        ge=0.0,
        le=1.0,
        description="chance of a copy to be rotated, to have a word repeated, and to have one blanked, each",
    )


class SentencesModelSpec(Spec):
    """A table of features for every place of every sentence, and a linear head over the words."""

    width: int = Field(64, ge=2, le=65536, description="features of a place, D")


class SentencesSpec(RunSpec):
    """Training of sentences; the model knows its own sentences only, so that none is logged by default."""

    task: Literal["sentences"] = Field("sentences", description="what is trained")
    data: SentencesDataSpec = SentencesDataSpec()
    model: SentencesModelSpec = SentencesModelSpec()
    tracking: ModelTrackingSpec = ModelTrackingSpec(model=False)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_small(self)
        SentencesTask.require_entries(self)
        return self


def clean_sentences(spec: SentencesDataSpec, seed: int) -> Tensor:
    """Return the sentences, random words in [1, V), shape (S, T), int64."""
    stream = np.random.default_rng([seed, _CLEAN])
    return torch.from_numpy(stream.integers(1, spec.words, (spec.sentences, spec.length)))


def edited(sentences: Tensor, chance: float, seed: int) -> Tensor:
    """Return sentences (N, T) of which each is rotated, has a word repeated, and one blanked, with a chance.

    A rotation is by any number of places; a repeated word moves those behind it on by one, and the last out.
    """
    stream = np.random.default_rng([seed, _EDITS])
    rows, length = sentences.shape
    places = torch.from_numpy(stream.integers(0, length, (3, rows, 1)))
    rotate, repeat, blank = torch.from_numpy(stream.random((3, rows, 1)) < chance)
    every = torch.arange(length)
    found = sentences.gather(1, (every + torch.where(rotate, places[0], 0)) % length)
    found = found.gather(1, every - (repeat & (every > places[1])).long())
    return found.masked_fill(blank & (every == places[2]), BLANK)


class SentencesModel(HeadedModel):
    """Features that are looked up by sentence and place; no place sees a word of the target.

    Args:
        spec: Its width.
        data: How many sentences, places and words.
        seed: Of the initial parameters.
    """

    def __init__(self, spec: SentencesModelSpec, data: SentencesDataSpec, seed: int) -> None:
        super().__init__()
        self._shape = data.length, spec.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.places = nn.Embedding(data.sentences, data.length * spec.width)
            self.words = nn.Linear(spec.width, data.words)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the features (B, T, D) of sentences by number, int64 (B,)."""
        found: Tensor = self.places(inputs).unflatten(1, self._shape)
        return found

    def head(self) -> Head:
        """Return the head with its bias."""
        return Head(self.words.weight, self.words.bias)

    def blocks(self) -> list[nn.Module]:
        """Return the table."""
        return [self.places]

    def checkpoint_activations(self) -> None:
        """Refuse: there is nothing to compute again.

        Raises:
            UserError: Always.
        """
        raise UserError("activation_checkpointing=true is for language models")


class SentencesTask(Task):
    """Edited copies of sentences; what is measured is how well the outputs are the clean ones.

    Args:
        spec: The run.
    """

    slug = "sentences"
    title = "sentences whose words are written at once, from edited copies"
    unit = "sentences"
    spec: ClassVar[type[RunSpec]] = SentencesSpec
    kinds = ("row", "sequence")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/pair_precision": "max",
        "eval/word_accuracy": "max",
        "eval/cross_entropy": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("pairs of words that are in the clean sentence", "eval/pair_precision", "{:.4f}"),
        ("words at their place", "eval/word_accuracy", "{:.4f}"),
        ("cross-entropy of clean words", "eval/cross_entropy", "{:.4f} nats"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Outputs beside the clean sentences",
        {"eval/pair_precision": "pairs of words", "eval/word_accuracy": "words at their place"},
    )

    def __init__(self, spec: SentencesSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec, learnt)
        self.run = spec
        clean = clean_sentences(spec.data, spec.seed)
        numbers = torch.arange(len(clean)).repeat(spec.data.copies)
        self.train = Examples(numbers, edited(clean[numbers], spec.data.edits, spec.seed))
        self.held_out = Examples(torch.arange(len(clean)), clean)

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """See :meth:`Task.prepare`."""
        del say, learnt
        return Prepared(guess=float(np.log(cast("SentencesSpec", spec).data.words)))

    @property
    def data_bytes(self) -> int:
        """See :attr:`Task.data_bytes`."""
        return cast("Examples", self.train).nbytes + cast("Examples", self.held_out).nbytes

    def build_model(self, model: Mapping[str, Any] | None = None) -> SentencesModel:
        """See :meth:`Task.build_model`."""
        spec = self.run.model if model is None else SentencesModelSpec.parse(model, source="model")
        return SentencesModel(spec, self.run.data, self.run.seed)

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations a sentence."""
        return count_step_flops(model, torch.zeros(1, dtype=torch.int64))

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many sentences count, and nothing further."""
        return float((batch["targets"] != IGNORE_INDEX).any(1).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return nats, words at their place and words; pairs that are in the sentence, and pairs."""
        logits, targets = outputs.logits, batch["targets"]
        valid = (targets != IGNORE_INDEX).all(1)
        words, clean = logits.argmax(-1)[valid], targets[valid]
        nats = functional.cross_entropy(
            logits[valid].flatten(0, 1).double(), clean.flatten(), reduction="sum"
        )
        right, found = (words == clean).sum(), in_sentence(words, clean)
        return as_sums(nats, right, clean.numel(), found.sum(), found.numel(), like=own)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        nats, right, words, found, pairs = sums.tolist()
        return {
            "eval/pair_precision": found / max(pairs, 1.0),
            "eval/word_accuracy": right / max(words, 1.0),
            "eval/cross_entropy": nats / max(words, 1.0),
        }, {}

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights and configuration; see :meth:`Task.save`."""
        del learnt
        own = cast("SentencesSpec", spec)
        run = own.model_dump(mode="json", include={"model", "data"})
        config = {"format": FORMAT, "format_version": FORMAT_VERSION, **run, "provenance": dict(provenance)}
        write_model(to, config, SentencesModel(own.model, own.data, own.seed), state)


def in_sentence(words: Tensor, clean: Tensor) -> Tensor:
    """Return which pairs of neighbours in words (N, T) are somewhere in the clean ones, bool (N, T − 1)."""
    ours, theirs = (torch.stack((x[:, :-1], x[:, 1:]), -1) for x in (words, clean))
    return (ours[:, :, None] == theirs[:, None]).all(-1).any(2)
