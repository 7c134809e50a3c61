"""Training of language models: next tokens of a text, with a head that never builds the logits."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration
from lossworks.data import TokenizedCorpus, prepare
from lossworks.data.answers import AnswerCorpus, prepare_answers, records_of
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.learnt import Learnt
from lossworks.data.order import spaced
from lossworks.data.text.readers import read_file
from lossworks.errors import UserError
from lossworks.head import Predicted
from lossworks.losses.objective import Objective
from lossworks.losses.rows import rows_of
from lossworks.models import LanguageModel, Outputs
from lossworks.models.pretrained import read_provenance
from lossworks.models.scoring import TextScorer
from lossworks.specs import DataSpec, LossSpec, ModelSpec, RunSpec
from lossworks.tasks.interface import ExampleRows, Mode, Predictions, Say, Simplest, as_sums
from lossworks.tasks.text.tokens import TokensTask, with_tokenizer

_SAMPLED_ROWS = 4096
_ACCURACY = "eval/answer_accuracy"


class TrainSpec(RunSpec):
    """Training of a language model."""

    task: Literal["language-model"] = Field("language-model", description="what is trained")
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()

    def text(self) -> DataSpec:
        """Return the data with the tokenizer settled: a transformers checkpoint brings its own."""
        return with_tokenizer(self.data, self.model)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        LanguageTask.require_entries(self)
        if self.data.isolate and self.model.source != "transformer":
            raise ValueError(
                f"data.isolate=true can't be combined with model.source={self.model.source}: it needs "
                "model.source=transformer"
            )
        if self.sharding.vocab_parallel:
            self._require_splittable_head()
        self._require_positions()
        return self

    def _require_positions(self) -> None:
        model, length = self.model, self.data.sequence_length
        if model.attention_temperature != "none" and model.temperature_positions < length:
            raise ValueError(
                f"model.temperature_positions={model.temperature_positions} must be at least "
                f"data.sequence_length={length}"
            )
        for term in self.loss.terms:
            if self.telemetry.looks and declaration(term.name).kind == "attention":
                raise ValueError(
                    f"telemetry looks at the losses of single tokens, and {term.name} has none; leave one out"
                )

    def _require_splittable_head(self) -> None:
        if self.telemetry.looks:
            raise ValueError(
                "telemetry can't be combined with sharding.vocab_parallel=true: no worker has whole rows of "
                "logits"
            )
        for term in self.loss.terms:
            if declaration(term.name).kind != "row":
                raise ValueError(f"loss.name={term.name} can't be combined with sharding.vocab_parallel=true")
        if self.sharding.kind != "fsdp":
            raise ValueError(
                f"sharding.vocab_parallel=true needs sharding=fsdp, not {self.sharding.kind}: "
                "otherwise every worker holds the whole head"
            )
        if self.model.source == "transformer" and self.model.tied:
            raise ValueError(
                "sharding.vocab_parallel=true can't split a head that is the embedding, too, whose look-up "
                "needs all classes: set model.tied=false"
            )
        if self.loss.impl == "reference":
            raise ValueError(
                "loss.impl=reference can't be combined with sharding.vocab_parallel=true: it builds the "
                "logits of all classes; use auto, cpu or triton"
            )


class LanguageTask(TokensTask):
    """Next tokens of a text, or of answers to prompts; the yardsticks are those of plain cross-entropy.

    Args:
        spec: The run.
        corpus: Its text.

    Raises:
        UserError: The text is too short.
    """

    slug = "language-model"
    title = "a language model on the next tokens of a text, or of answers to prompts"
    spec: ClassVar[type[RunSpec]] = TrainSpec
    kinds = ("row", "sequence", "distillation", "attention")
    provides = ("inputs", "targets", "segments")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/cross_entropy": "min",
        "eval/bits_per_byte": "min",
        "eval/perplexity": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out cross-entropy", "eval/cross_entropy", "{:.4f} nats a token"),
        ("held-out perplexity", "eval/perplexity", "{:.2f}"),
        ("held-out bits per byte", "eval/bits_per_byte", "{:.4f}"),
        ("answers that are wholly right", _ACCURACY, "{:.1%}"),
    )

    def __init__(self, spec: TrainSpec, corpus: TokenizedCorpus | AnswerCorpus) -> None:
        super().__init__(spec, corpus)
        self.run = spec
        # What can only be known by heart is measured where it was learnt.
        by_heart = spec.data.by_heart and isinstance(corpus, AnswerCorpus)
        self.train, self.held_out = (
            (corpus.all(), corpus.all())  # type: ignore[union-attr]  # asked for above
            if by_heart
            else corpus.split(spec.data)
        )
        if spec.data.isolate and corpus.end_of_text is None:
            raise UserError(
                f"data.isolate=true: {spec.text().tokenizer} has no token that ends documents, such as "
                "<|endoftext|>"
            )
        # Plain cross-entropy is measured beside any other loss, and isn't computed twice.
        plain = LossSpec(impl=spec.loss.impl)
        self._plain = None if spec.loss == plain else Objective(plain)
        if any("segments" in declaration(term.name).requires for term in spec.loss.terms):
            lines = corpus.line_ends()
            self.train, self.held_out = (part.with_steps(lines) for part in (self.train, self.held_out))

    @classmethod
    def read(
        cls, spec: RunSpec, learnt: Learnt | None, say: Say | None = None
    ) -> TokenizedCorpus | AnswerCorpus:
        """See :meth:`TokensTask.read`."""
        run = cast("TrainSpec", spec)
        data = with_tokenizer(run.data, run.model, learnt)
        if not data.answered:
            return prepare(data, on_progress=say)
        return prepare_answers(records_of(data), data, packed=data.packed, on_progress=say)

    @classmethod
    def opened(cls, spec: RunSpec, folder: Path) -> TokenizedCorpus | AnswerCorpus:
        """See :meth:`TokensTask.opened`."""
        answered = cast("TrainSpec", spec).data.answered
        return AnswerCorpus.open(folder) if answered else TokenizedCorpus.open(folder)

    @classmethod
    def answers(cls, spec: RunSpec) -> bool:
        """See :meth:`Task.answers`: those to prompts."""
        return cast("TrainSpec", spec).data.answered

    @property
    def guess(self) -> float:
        """The nats of a uniform guess."""
        return math.log(self.corpus.vocab_size)

    @classmethod
    def measured_by(cls, spec: RunSpec) -> dict[str, Mode]:
        """See :meth:`Task.measured_by`; of answers, how many are wholly right."""
        further: dict[str, Mode] = {_ACCURACY: "max"} if cast("TrainSpec", spec).data.answered else {}
        return {**super().measured_by(spec), **further}

    @classmethod
    def takes(cls, entry: Declaration, spec: RunSpec | None = None) -> bool:
        """Return whether a loss can be one of next tokens, without logits."""
        return super().takes(entry, spec) and entry.without_logits and "own-outputs" not in entry.flags

    @classmethod
    def compared_by(cls) -> str:
        """See :meth:`Task.compared_by`: bits a byte, which don't depend on how text is cut into tokens."""
        return "eval/bits_per_byte"

    def row_owners(self) -> np.ndarray | None:
        """See :meth:`Task.row_owners`; of text, of each sequence."""
        return getattr(self.train, "owners", None)

    def adapted(self, model: LanguageModel) -> LanguageModel:
        """Have a model keep documents apart if the run does."""
        if self.run.data.isolate and self.corpus.end_of_text is not None:
            model.isolate(self.corpus.end_of_text)
        return model

    def simplest(self) -> Simplest:
        """Return what the tokens' shares get, taken for probabilities; of long texts those of a sample."""
        train, held_out = (_sampled_targets(part) for part in (self.train, self.held_out))
        counts = torch.bincount(train[train != IGNORE_INDEX], minlength=self.corpus.vocab_size) + 1.0
        nats = -(counts / counts.sum()).log()[held_out[held_out != IGNORE_INDEX]].double().sum()
        sums = as_sums(nats, *self.counts({"targets": held_out}), like=nats)
        return Simplest("the tokens' shares alone", self.figures(sums)[0])

    def train_metrics(self, loss: float, units: float, further: float) -> dict[str, float]:
        """Return the loss, and where that is cross-entropy, bits per byte."""
        if self._plain is not None:
            return {"train/loss": loss}
        return {
            "train/loss": loss,
            "train/cross_entropy": loss,
            "train/bits_per_byte": bits_per_byte(loss * units, further),
        }

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return nats, tokens and bytes."""
        nats = own[0] if self._plain is None else self._plain(outputs, batch)[0]
        tokens, text_bytes = self.counts(batch)
        if not self.run.data.answered:
            return as_sums(nats, tokens, text_bytes, like=own)
        (predicted,) = rows_of(outputs, batch["targets"])(Predicted())
        answers = right_answers(predicted, batch["targets"])
        return as_sums(nats, tokens, text_bytes, *answers, like=own)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return cross-entropy, bits per byte and perplexity."""
        nats, tokens, text_bytes, *answers = sums.tolist()
        mean = nats / tokens
        yardsticks = {
            "eval/cross_entropy": mean,
            "eval/bits_per_byte": bits_per_byte(nats, text_bytes),
            "eval/perplexity": math.exp(mean) if mean < 700 else math.inf,
        }
        if answers:
            right, all_answers = answers
            yardsticks[_ACCURACY] = right / max(all_answers, 1.0)
        return yardsticks, {}

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return how well each document of a file is predicted; see :meth:`Task.predict`."""
        if not file.is_file():
            raise UserError(f"{file}: {'is no file' if file.exists() else 'no such file'}")
        scorer, texts = TextScorer.load(folder), [""]
        field = read_provenance(folder).get("data", {}).get("field", "text")
        for piece in read_file(file, field):
            texts[-1] += piece.text
            if piece.ends_document:
                texts.append("")
        scores = [scorer.score(text) for text in texts if text]
        columns: dict[str, Sequence[Any]] = {
            "document": list(range(1, len(scores) + 1)),
            "nats per token": [score.loss for score in scores],
            "bits per byte": [score.bits_per_byte for score in scores],
        }
        return Predictions(columns)


def _sampled_targets(rows: ExampleRows) -> Tensor:
    """Return the targets of rows that are spread evenly, all of them where there are few."""
    return rows.batch(spaced(_SAMPLED_ROWS, len(rows)))["targets"]


def right_answers(predicted: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many sequences have all tokens that count predicted right, and how many have any.

    Each token is predicted from the right ones before it; where all are right, they are also what the model
    writes when it takes the likeliest token each time.

    Args:
        predicted: The likeliest tokens, (…, L) int64.
        targets: (…, L) int64.
    """
    valid = targets != IGNORE_INDEX
    right = ((predicted == targets) | ~valid).all(-1)
    return (right & valid.any(-1)).sum(), valid.any(-1).sum()


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a summed loss in bits over the bytes of its text; NaN where there was no text."""
    return nats / (math.log(2) * text_bytes) if text_bytes else math.nan
