"""What tasks on tokens have in common: a corpus with its tokenizer, a causal language model, its folders."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lossworks.data.answers import AnswerCorpus
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.learnt import Learnt
from lossworks.data.text.aligned_corpus import AlignedCorpus
from lossworks.data.text.blank_corpus import BlankCorpus
from lossworks.data.text.tokenized_corpus import TokenizedCorpus
from lossworks.data.text.tokenizer import load_tokenizer
from lossworks.models import HeadedModel, LanguageModel, build_model, load_model, save_model
from lossworks.models.huggingface import from_config
from lossworks.models.pretrained import TOKENIZER
from lossworks.specs import ModelSpec, RunSpec, TokensSpec
from lossworks.tasks.interface import Prepared, Say, Task, readers
from lossworks.tasks.registry import task_class

D = TypeVar("D", bound=TokensSpec)
Corpus = TokenizedCorpus | AnswerCorpus | AlignedCorpus


class TokensRunSpec(Protocol):
    """The parts of a run's spec that tasks on tokens read."""

    data: TokensSpec
    model: ModelSpec


class TokensTask(Task):
    """A task that trains a causal language model on tokens.

    Args:
        spec: The run.
        corpus: Its tokens.
    """

    unit = "tokens"
    prepares_long = True
    flops_formula = (
        "6 a matrix parameter and 12·layers·width·length for attention, a token "
        "(Chowdhery et al. 2022, appendix B)"
    )

    def __init__(self, spec: RunSpec, corpus: Corpus) -> None:
        super().__init__(spec)
        self.corpus = corpus
        self.token_bytes = torch.from_numpy(np.array(corpus.token_bytes))

    @classmethod
    @abstractmethod
    def read(cls, spec: RunSpec, learnt: Learnt | None, say: Say | None = None) -> Corpus:
        """Return the tokens of a spec's data, encoded now or found in the cache.

        Args:
            spec: The run.
            learnt: What the model has learnt from data before; its tokenizer holds.
            say: Called with what is going on.

        Raises:
            UserError: The data can't be used.
        """

    @classmethod
    def opened(cls, spec: RunSpec, folder: Path) -> Corpus:
        """Return the tokens in a folder that ``prepare`` made."""
        del spec
        return AnswerCorpus.open(folder)

    @classmethod
    def open(cls, spec: RunSpec, folder: Path | None, learnt: Learnt | None = None) -> Self:
        """See :meth:`Task.open`; without a folder the text is tokenised here."""
        return cls(spec, cls.read(spec, learnt) if folder is None else cls.opened(spec, folder))

    @classmethod
    def open_blank(cls, spec: RunSpec, learnt: Learnt | None = None) -> Self:
        """See :meth:`Task.open_blank`; no text is read: the spec or its tokenizer says the vocabulary."""
        del learnt
        data = with_tokenizer(_run(spec).data, _run(spec).model)
        vocab_size = data.vocab_size
        if data.tokenizer is not None:
            vocab_size = load_tokenizer(data.tokenizer).get_vocab_size()
        return cls(spec, cls.blank(spec, vocab_size))

    @classmethod
    def blank(cls, spec: RunSpec, vocab_size: int) -> Corpus:
        """Return a corpus that has shapes alone."""
        del spec
        return BlankCorpus(vocab_size)

    @classmethod
    def takes_models_of(cls, slug: str) -> bool:
        """See :meth:`Task.takes_models_of`: all tasks on tokens train the same kind of model."""
        return issubclass(task_class(slug), TokensTask)

    @classmethod
    def adopting(cls, spec: RunSpec, learnt: Learnt, role: str | None = None) -> RunSpec:
        """See :meth:`Task.adopting`: the tokenizer; a companion's where nothing else says which."""
        run = _run(spec)
        said = spec.start is not None or with_tokenizer(run.data, run.model).tokenizer is not None
        foreign = any("other-tokens" in entry.flags for entry in readers(spec))
        if TOKENIZER not in learnt.files or (role is not None and (said or foreign)):
            return spec
        return spec.model_copy(update={"data": with_tokenizer(run.data, run.model, learnt)})

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        files = {TOKENIZER: self.corpus.tokenizer_path}
        return Learnt({"vocab_size": self.corpus.vocab_size}, files, self.corpus.fingerprint)

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """Tokenise the text; see :meth:`Task.prepare`."""
        task = cls(spec, cls.read(spec, learnt, say))
        return Prepared(task.corpus.folder, task.guess, task.learnt, task.simplest())

    @property
    def guess(self) -> float | None:
        """The loss of a uniform guess under cross-entropy; None where the report marks none."""
        return None

    @classmethod
    def reopen(
        cls, spec: RunSpec, folder: Path, learnt: Learnt, fill: Callable[[HeadedModel], None]
    ) -> tuple[Task, HeadedModel]:
        """See :meth:`Task.reopen`; the text is tokenised with the model's own tokenizer."""
        del fill
        model, _ = load_model(folder)
        task = cls.open(spec, None, learnt)
        return task, task.adapted(model)

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """Return why language models aren't trained many at once."""
        del spec
        return "language models fill a worker each"

    def build_model(self, model: Mapping[str, Any] | None = None) -> LanguageModel:
        """See :meth:`Task.build_model`."""
        return self.adapted(self.made(model, self.corpus.vocab_size))

    def empty_model(self, model: Mapping[str, Any] | None = None) -> LanguageModel:
        """See :meth:`Task.empty_model`; of a checkpoint of transformers, the configuration is read."""
        return self.adapted(self.made(model, self.corpus.vocab_size, empty=True))

    def made(self, model: Mapping[str, Any] | None, vocab_size: int, *, empty: bool = False) -> LanguageModel:
        """Return a language model that reads as models do by themselves.

        Args:
            model: The model's part of a spec, as plain data; None for this run's.
            vocab_size: Entries of its tokenizer.
            empty: Whether its parameters may hold anything.

        Raises:
            UserError: The model doesn't fit the tokenizer.
        """
        run = self.spec_of_run
        spec = _run(run).model if model is None else ModelSpec.parse(model, source="model")
        if empty and spec.source != "transformer":
            return from_config(spec, device="cpu")
        return build_model(spec, vocab_size=vocab_size, seed=run.seed)

    def adapted(self, model: LanguageModel) -> LanguageModel:
        """Return a model that reads as the run wants it."""
        return model

    @property
    def units_per_row(self) -> int:  # type: ignore[override]  # of the run, not of the kind
        """See :class:`Task`: tokens a sequence, of all candidates."""
        candidates = self.corpus.candidates if isinstance(self.corpus, AnswerCorpus) else 1
        return _run(self.spec_of_run).data.sequence_length * candidates

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many tokens count, and how many bytes of text they stand for."""
        return count_tokens(batch["targets"].cpu(), self.token_bytes)

    def flops_per_unit(self, model: HeadedModel) -> float | None:
        """Return the operations a token."""
        if not isinstance(model, LanguageModel):
            return None
        return model.flops_per_token(_run(self.spec_of_run).data.sequence_length)

    def head_rows(self, ranks: int) -> int:
        """Return the tokens of a rank's micro-batch."""
        run = self.spec_of_run
        share = math.ceil(run.batch_size / ranks)
        return min(run.rows_at_once or run.batch_size, share) * self.units_per_row

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
            spec=_run(spec).model,
            state=state,
            vocab_size=int(learnt.fact("vocab_size")),
            tokenizer_path=learnt.files[TOKENIZER],
            provenance=provenance,
        )


def require_whole_head(spec: RunSpec) -> None:
    """Refuse what looks at single rows of logits, or at a part of the classes, where answers are whole.

    Raises:
        ValueError: Naming the field and the task.
    """
    task = getattr(spec, "task", "")
    if spec.sharding.vocab_parallel:
        raise ValueError(f"sharding.vocab_parallel=true can't be combined with task={task}")
    if spec.telemetry.every:
        raise ValueError(
            f"telemetry.every={spec.telemetry.every} can't be combined with task={task}: set it to 0"
        )


def with_tokenizer(data: D, model: ModelSpec, learnt: Learnt | None = None) -> D:
    """Return data with the tokenizer settled: of what a model has learnt with, or of its checkpoint."""
    if learnt is not None:
        return data.model_copy(update={"tokenizer": str(learnt.files[TOKENIZER].absolute())})
    if data.tokenizer is None and model.source.startswith("hf:"):
        path = Path(model.source.removeprefix("hf:")).expanduser() / TOKENIZER
        return data.model_copy(update={"tokenizer": str(path)})
    return data


def count_tokens(targets: Tensor, token_bytes: Tensor) -> tuple[int, float]:
    """Return how many targets are valid, and how many bytes of text they stand for."""
    valid = targets[targets != IGNORE_INDEX]
    return valid.numel(), float(token_bytes[valid].sum())


def _run(spec: RunSpec) -> TokensRunSpec:
    return cast("TokensRunSpec", spec)
