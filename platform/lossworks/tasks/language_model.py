"""Training of language models: next tokens of a text, with a head that never builds the logits."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration
from lossworks.data import TokenizedCorpus, prepare
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.learnt import Learnt
from lossworks.data.order import spaced
from lossworks.data.text.blank_corpus import BlankCorpus
from lossworks.data.text.readers import read_file
from lossworks.data.text.tokenizer import load_tokenizer
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, LanguageModel, Outputs, build_model, load_model, save_model
from lossworks.models.huggingface import from_config, local_folder
from lossworks.models.pretrained import TOKENIZER, read_provenance
from lossworks.models.scoring import TextScorer
from lossworks.specs import DataSpec, LossSpec, ModelSpec, RunSpec
from lossworks.tasks.interface import ExampleRows, Mode, Predictions, Prepared, Say, Simplest, Task, as_sums

_SAMPLED_ROWS = 4096


class TrainSpec(RunSpec):
    """Training of a language model."""

    task: Literal["language-model"] = Field("language-model", description="what is trained")
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()

    def text(self) -> DataSpec:
        """Return the data with the tokenizer settled: a transformers checkpoint brings its own."""
        if self.data.tokenizer is None and self.model.source.startswith("hf:"):
            path = Path(self.model.source.removeprefix("hf:")).expanduser() / "tokenizer.json"
            return self.data.model_copy(update={"tokenizer": str(path)})
        return self.data

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
        return self

    def _require_splittable_head(self) -> None:
        if self.telemetry.looks:
            raise ValueError(
                "telemetry can't be combined with sharding.vocab_parallel=true: no worker has whole rows of "
                "logits"
            )
        for term in self.loss.terms:
            if declaration(term.name).kind == "sequence":
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


class LanguageTask(Task):
    """Next tokens of a text; the yardsticks are plain cross-entropy, perplexity and bits per byte.

    Args:
        spec: The run.
        corpus: Its text.

    Raises:
        UserError: The text is too short.
    """

    slug = "language-model"
    title = "a language model on the next tokens of a text"
    unit = "tokens"
    spec: ClassVar[type[RunSpec]] = TrainSpec
    kinds = ("row", "sequence")
    provides = ("inputs", "targets", "segments")
    prepares_long = True
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/cross_entropy": "min",
        "eval/bits_per_byte": "min",
        "eval/perplexity": "min",
    }
    flops_formula = (
        "6 a matrix parameter and 12·layers·width·length for attention, a token "
        "(Chowdhery et al. 2022, appendix B)"
    )
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out cross-entropy", "eval/cross_entropy", "{:.4f} nats a token"),
        ("held-out perplexity", "eval/perplexity", "{:.2f}"),
        ("held-out bits per byte", "eval/bits_per_byte", "{:.4f}"),
    )

    def __init__(self, spec: TrainSpec, corpus: TokenizedCorpus) -> None:
        super().__init__(spec)
        self.run, self.corpus = spec, corpus
        self.train, self.held_out = corpus.split(spec.data)
        if spec.data.isolate and corpus.end_of_text is None:
            raise UserError(
                f"data.isolate=true: {spec.text().tokenizer} has no token that ends documents, such as "
                "<|endoftext|>"
            )
        self._token_bytes = torch.from_numpy(np.array(corpus.token_bytes))
        # Plain cross-entropy is measured beside any other loss, and isn't computed twice.
        plain = LossSpec(impl=spec.loss.impl)
        self._plain = None if spec.loss == plain else Objective(plain)
        if any("segments" in declaration(term.name).requires for term in spec.loss.terms):
            lines = corpus.line_ends()
            self.train, self.held_out = (part.with_steps(lines) for part in (self.train, self.held_out))

    @classmethod
    def open(cls, spec: RunSpec, folder: Path | None, learnt: Learnt | None = None) -> "LanguageTask":
        """See :meth:`Task.open`; without a folder the text is tokenised here."""
        run = cast("TrainSpec", spec)
        corpus = prepare(_text(run, learnt)) if folder is None else TokenizedCorpus.open(folder)
        return cls(run, corpus)

    @classmethod
    def open_blank(cls, spec: RunSpec) -> "LanguageTask":
        """See :meth:`Task.open_blank`; no text is read: the spec or its tokenizer says the vocabulary."""
        run = cast("TrainSpec", spec)
        text = run.text()
        vocab_size = text.vocab_size
        if text.tokenizer is not None:
            vocab_size = load_tokenizer(text.tokenizer).get_vocab_size()
        return cls(run, BlankCorpus(vocab_size))

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        files = {TOKENIZER: self.corpus.tokenizer_path}
        return Learnt({"vocab_size": self.corpus.vocab_size}, files, self.corpus.fingerprint)

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """Tokenise the text; see :meth:`Task.prepare`."""
        run = cast("TrainSpec", spec)
        task = cls(run, prepare(_text(run, learnt), on_progress=say))
        guess = math.log(task.corpus.vocab_size)
        return Prepared(task.corpus.folder, guess, task.learnt, task.simplest())

    @classmethod
    def reopen(
        cls, spec: RunSpec, folder: Path, learnt: Learnt, fill: Callable[[HeadedModel], None]
    ) -> "tuple[Task, HeadedModel]":
        """See :meth:`Task.reopen`; the text is tokenised with the model's own tokenizer."""
        del fill
        model, _ = load_model(folder)
        task = cls.open(spec, None, learnt)
        return task, task._isolating(model)

    @classmethod
    def takes(cls, entry: Declaration, spec: RunSpec | None = None) -> bool:
        """Return whether a loss can be one of next tokens, without logits."""
        return super().takes(entry, spec) and entry.without_logits and "own-outputs" not in entry.flags

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """Return why language models aren't trained many at once."""
        del spec
        return "language models fill a worker each"

    def build_model(self, model: Mapping[str, Any] | None = None) -> LanguageModel:
        """See :meth:`Task.build_model`."""
        spec = self.run.model if model is None else ModelSpec.parse(model, source="model")
        return self._isolating(build_model(spec, vocab_size=self.corpus.vocab_size, seed=self.run.seed))

    def _isolating(self, model: LanguageModel) -> LanguageModel:
        """Have a model keep documents apart if the run does."""
        if self.run.data.isolate and self.corpus.end_of_text is not None:
            model.isolate(self.corpus.end_of_text)
        return model

    def empty_model(self, model: Mapping[str, Any] | None = None) -> LanguageModel:
        """See :meth:`Task.empty_model`; of a checkpoint of transformers, the configuration is read."""
        spec = self.run.model if model is None else ModelSpec.parse(model, source="model")
        if spec.source == "transformer":
            return self.build_model(model)
        return self._isolating(from_config(local_folder(spec), device="cpu"))

    @property
    def units_per_row(self) -> int:  # type: ignore[override]  # of the run, not of the kind
        """See :class:`Task`: tokens a sequence."""
        return self.run.data.sequence_length

    def simplest(self) -> Simplest:
        """Return what the tokens' shares get, taken for probabilities; of long texts those of a sample."""
        train, held_out = (_sampled_targets(part) for part in (self.train, self.held_out))
        counts = torch.bincount(train[train != IGNORE_INDEX], minlength=self.corpus.vocab_size) + 1.0
        nats = -(counts / counts.sum()).log()[held_out[held_out != IGNORE_INDEX]].double().sum()
        sums = as_sums(nats, *self.counts({"targets": held_out}), like=nats)
        return Simplest("the tokens' shares alone", self.figures(sums)[0])

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many tokens count, and how many bytes of text they stand for."""
        return count_tokens(batch["targets"].cpu(), self._token_bytes)

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
        return as_sums(nats, tokens, text_bytes, like=own)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return cross-entropy, bits per byte and perplexity."""
        nats, tokens, text_bytes = sums.tolist()
        mean = nats / tokens
        yardsticks = {
            "eval/cross_entropy": mean,
            "eval/bits_per_byte": bits_per_byte(nats, text_bytes),
            "eval/perplexity": math.exp(mean) if mean < 700 else math.inf,
        }
        return yardsticks, {}

    def flops_per_unit(self, model: HeadedModel) -> float | None:
        """Return the operations a token."""
        if not isinstance(model, LanguageModel):
            return None
        return model.flops_per_token(self.run.data.sequence_length)

    def head_rows(self, ranks: int) -> int:
        """Return the tokens of a rank's micro-batch."""
        run = self.run
        share = math.ceil(run.batch_size / ranks)
        return min(run.rows_at_once or run.batch_size, share) * run.data.sequence_length

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

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights, configuration and tokenizer; see :meth:`Task.save`."""
        save_model(
            to,
            spec=cast("TrainSpec", spec).model,
            state=state,
            vocab_size=int(learnt.fact("vocab_size")),
            tokenizer_path=learnt.files[TOKENIZER],
            provenance=provenance,
        )


def _sampled_targets(rows: ExampleRows) -> Tensor:
    """Return the targets of rows that are spread evenly, all of them where there are few."""
    return rows.batch(spaced(_SAMPLED_ROWS, len(rows)))["targets"]


def _text(spec: TrainSpec, learnt: Learnt | None) -> DataSpec:
    """Return the data with the tokenizer settled: a model that has learnt with one keeps it."""
    text = spec.text()
    if learnt is None:
        return text
    return text.model_copy(update={"tokenizer": str(learnt.files[TOKENIZER].absolute())})


def count_tokens(targets: Tensor, token_bytes: Tensor) -> tuple[int, float]:
    """Return how many targets are valid, and how many bytes of text they stand for."""
    valid = targets[targets != IGNORE_INDEX]
    return valid.numel(), float(token_bytes[valid].sum())


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a summed loss in bits over the bytes of its text; NaN where there was no text."""
    return nats / (math.log(2) * text_bytes) if text_bytes else math.nan
