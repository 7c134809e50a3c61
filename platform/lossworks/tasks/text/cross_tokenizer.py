"""Training of a language model on a teacher whose tokens differ: both read the same text, each in its own."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.data.batch import Batch
from lossworks.data.learnt import Learnt
from lossworks.data.text.aligned_corpus import AlignedCorpus, BlankAligned, prepare_aligned
from lossworks.entries.losses.distillation.alm import (
    chunk_sums,
    word_end_log_probabilities,
)
from lossworks.errors import UserError
from lossworks.losses.rows import token_log_probabilities
from lossworks.models import LanguageModel, Outputs
from lossworks.models.pretrained import TOKENIZER
from lossworks.specs import DataSpec, LossSpec, ModelSpec, RoleSpec, RunSpec
from lossworks.tasks.interface import Mode, Say, as_sums
from lossworks.tasks.text.language_model import bits_per_byte
from lossworks.tasks.text.tokens import TokensTask, require_whole_head, with_tokenizer

_TEACHER = "teacher"


class AlignedDataSpec(DataSpec):
    """A text that two models read, each in its own tokens."""

    teacher_tokenizer: str | None = Field(
        None, description="path of the teacher's tokenizer.json; by default that of the run or checkpoint"
    )

    @model_validator(mode="after")
    def _is_running_text(self) -> Self:
        if self.answered or self.isolate:
            what = f"corpus={self.corpus}" if self.answered else "isolate=true"
            raise ValueError(f"{what} can't be combined with task=cross-tokenizer, which reads running text")
        return self


class CrossTokenizerSpec(RunSpec):
    """Training of a language model on a teacher whose tokens differ."""

    task: Literal["cross-tokenizer"] = Field("cross-tokenizer", description="what is trained")
    data: AlignedDataSpec = AlignedDataSpec()
    model: ModelSpec = ModelSpec()
    loss: LossSpec = LossSpec(name="alm")
    roles: dict[str, RoleSpec] = Field(
        {_TEACHER: RoleSpec(of="demo")},
        description="the teacher: a run, a folder of `lossworks export`, or hf:PATH; by default the last run "
        "that is called demo",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        CrossTokenizerTask.require_entries(self)
        role = self.roles.get(_TEACHER)
        if role is None or role.of in (None, "start"):
            raise ValueError(
                "roles: task=cross-tokenizer learns from a companion named teacher, which reads other "
                "tokens; set roles.teacher.of to a run, a folder or hf:PATH"
            )
        require_whole_head(self)
        return self


class CrossTokenizerTask(TokensTask):
    """Next tokens of a text beside a teacher's; the yardsticks are bits a byte, of both.

    Args:
        spec: The run.
        corpus: Its text, in the tokens of both.

    Raises:
        UserError: The text is too short.
    """

    slug = "cross-tokenizer"
    title = "a language model on a teacher that reads other tokens"
    spec: ClassVar[type[RunSpec]] = CrossTokenizerSpec
    kinds = ("cross-tokenizer", "row")
    provides = ("inputs", "targets", "chunks", "teacher_log_p", "teacher_word_ends", "word_classes")
    companions_read_alike = False
    element = "chunk"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/bits_per_byte": "min", "eval/chunk_gap": "min"}
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out bits per byte", "eval/bits_per_byte", "{:.4f}"),
        ("those of the teacher", "eval/teacher_bits_per_byte", "{:.4f}"),
        ("distance of a chunk's log-probability to the teacher's", "eval/chunk_gap", "{:.3f} nats"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out bits per byte",
        {"eval/bits_per_byte": "model", "eval/teacher_bits_per_byte": "teacher"},
    )

    def __init__(self, spec: CrossTokenizerSpec, corpus: AlignedCorpus) -> None:
        super().__init__(spec, corpus)
        self.run, self.aligned = spec, corpus
        self.train, self.held_out = corpus.split(spec.data)

    @classmethod
    def read(cls, spec: RunSpec, learnt: Learnt | None, say: Say | None = None) -> AlignedCorpus:
        """See :meth:`TokensTask.read`."""
        run = cast("CrossTokenizerSpec", spec)
        data = with_tokenizer(run.data, run.model, learnt)
        if data.teacher_tokenizer is None:
            raise UserError(
                "data.teacher_tokenizer: is not known; set it to the teacher's tokenizer.json, or "
                "roles.teacher.of to a run that keeps one"
            )
        return prepare_aligned(data, data.teacher_tokenizer, on_progress=say)

    @classmethod
    def opened(cls, spec: RunSpec, folder: Any) -> AlignedCorpus:
        """See :meth:`TokensTask.opened`."""
        del spec
        return AlignedCorpus.open(folder)

    @classmethod
    def blank(cls, spec: RunSpec, vocab_size: int) -> AlignedCorpus:
        """See :meth:`TokensTask.blank`."""
        return BlankAligned(vocab_size, cast("CrossTokenizerSpec", spec).data.sequence_length)

    @classmethod
    def reads(cls, spec: RunSpec) -> tuple[str, ...]:
        """Return the teacher."""
        del spec
        return (_TEACHER,)

    @classmethod
    def adopting(cls, spec: RunSpec, learnt: Learnt, role: str | None = None) -> RunSpec:
        """See :meth:`Task.adopting`: a start's tokenizer for the model, and the teacher's beside it."""
        run = cast("CrossTokenizerSpec", spec)
        if role is None:
            return super().adopting(spec, learnt)
        file = learnt.files.get(TOKENIZER)
        if role != _TEACHER or file is None or run.data.teacher_tokenizer is not None:
            return spec
        data = run.data.model_copy(update={"teacher_tokenizer": str(file.absolute())})
        return spec.model_copy(update={"data": data})

    def build_companion(self, model: Mapping[str, Any], *, empty: bool = False) -> LanguageModel:
        """See :meth:`Task.build_companion`: with the vocabulary of its own tokenizer."""
        return self.made(model, self.aligned.teacher_vocab_size, empty=empty)

    def completed(self, batch: Batch, companions: Callable[[Batch, str], dict[str, Outputs]]) -> Batch:
        """Return a batch with what the teacher says of its chunks."""
        if "teacher_inputs" not in batch:  # text that an analysis reads
            return batch
        outputs = companions(batch, "teacher_inputs")[_TEACHER]
        device, impl = outputs.hidden.device, self.run.loss.impl
        targets, chunks = (batch[f"teacher_{name}"].to(device) for name in ("targets", "chunks"))
        count = targets.shape[1]
        words = self.aligned.starts_a_word["teacher"].to(device)
        log_p = token_log_probabilities(outputs, targets, impl=impl)
        return {
            **batch,
            "teacher_log_p": chunk_sums(log_p, chunks, count),
            "teacher_word_ends": word_end_log_probabilities(outputs, chunks, words, count, impl),
        }

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return nats of both, bytes, the sum of the chunks' distances, and chunks."""
        del own
        targets, theirs = batch["targets"], batch["teacher_log_p"]
        log_p = token_log_probabilities(outputs, targets, impl=self.run.loss.impl)
        chunks = torch.where(targets >= 0, batch["chunks"], -1)
        sums = chunk_sums(log_p, chunks, theirs.shape[1])
        count = torch.arange(theirs.shape[1], device=sums.device) <= chunks.amax(1, keepdim=True)
        gaps = torch.where(count, (sums - theirs).abs(), 0)
        _, size = self.counts(batch)
        return as_sums(
            -log_p.double().sum(), -theirs.double().sum(), size, gaps.sum(), count.sum(), like=log_p
        )

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        nats, theirs, size, gaps, chunks = sums.tolist()
        return {
            "eval/bits_per_byte": bits_per_byte(nats, size),
            "eval/teacher_bits_per_byte": bits_per_byte(theirs, size),
            "eval/chunk_gap": gaps / max(chunks, 1.0),
        }, {}
