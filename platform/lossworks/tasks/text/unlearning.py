"""Training by which a language model forgets the answers to some prompts and keeps those to others."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.registry import declaration
from lossworks.data.answers import (
    AnswerCorpus,
    AnswerRecord,
    AnswerRows,
    BlankAnswers,
    forget_and_retain,
    prepare_answers,
)
from lossworks.data.answers.examples import Example, answer_of, asked, text_of
from lossworks.data.batch import Batch
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.head import LogSumExp, Predicted, Target
from lossworks.losses.rows import answer_log_probabilities, rows_of
from lossworks.losses.unlearning import FORGET, RETAIN
from lossworks.models import Outputs
from lossworks.specs import LossSpec, ModelSpec, RunSpec, UnlearningDataSpec
from lossworks.tasks.interface import ExampleRows, Mode, Say, as_sums
from lossworks.tasks.text.language_model import right_answers
from lossworks.tasks.text.tokens import TokensTask, require_whole_head, with_tokenizer

_MASKED, _UNSEEN = "masked_classes", "unseen"
_CANDIDATES = 3  # to be forgotten, to stay, and a wrong answer


class UnlearningSpec(RunSpec):
    """Unlearning of some answers of a language model."""

    task: Literal["unlearning"] = Field("unlearning", description="what is trained")
    data: UnlearningDataSpec = UnlearningDataSpec()
    model: ModelSpec = ModelSpec()
    loss: LossSpec = LossSpec(name="constrained-unlearning")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        UnlearningTask.require_entries(self)
        require_whole_head(self)
        return self


class UnlearningTask(TokensTask):
    """What is to be forgotten and what is to stay; both are measured where they are trained.

    Args:
        spec: The run.
        corpus: Its answers, three candidates: to be forgotten, to stay, and a wrong answer instead of the
            first one.
    """

    slug = "unlearning"
    title = "a language model to forget some answers and to keep others"
    spec: ClassVar[type[RunSpec]] = UnlearningSpec
    kinds = ("unlearning",)
    provides = ("inputs", "targets", _MASKED)
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/forget_accuracy": "min",
        "eval/retain_accuracy": "max",
        "eval/forget_probability": "min",
        "eval/forget_cross_entropy": "max",
        "eval/retain_cross_entropy": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("answers to be forgotten that are still right", "eval/forget_accuracy", "{:.1%}"),
        ("answers to stay that are right", "eval/retain_accuracy", "{:.1%}"),
        ("probability of answers to be forgotten", "eval/forget_probability", "{:.2%}"),
        ("their cross-entropy", "eval/forget_cross_entropy", "{:.3f} nats a token"),
        ("that of answers to stay", "eval/retain_cross_entropy", "{:.3f} nats a token"),
        ("distance to a model that never saw them", "eval/membership_distance", "{:.3f} nats a token"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Answers that are wholly right",
        {"eval/forget_accuracy": "to be forgotten", "eval/retain_accuracy": "to stay"},
    )

    def __init__(self, spec: UnlearningSpec, corpus: AnswerCorpus) -> None:
        super().__init__(spec, corpus)
        self.run = spec
        rows: ExampleRows = corpus.all()
        if any(_MASKED in declaration(term.name).requires for term in spec.loss.terms):
            rows = MaskedRows(corpus.all(), corpus.classes_of(FORGET))
        self.train = self.held_out = rows

    @classmethod
    def read(cls, spec: RunSpec, learnt: Learnt | None, say: Say | None = None) -> AnswerCorpus:
        """See :meth:`TokensTask.read`."""
        run = cast("UnlearningSpec", spec)
        data = with_tokenizer(run.data, run.model, learnt)
        return prepare_answers(side_by_side(*forget_and_retain(data)), data, on_progress=say)

    @classmethod
    def blank(cls, spec: RunSpec, vocab_size: int) -> AnswerCorpus:
        """See :meth:`TokensTask.blank`."""
        length = cast("UnlearningSpec", spec).data.sequence_length
        return BlankAnswers(vocab_size, length, _CANDIDATES, {})

    @classmethod
    def reads(cls, spec: RunSpec) -> tuple[str, ...]:
        """Return the model that never saw what is to be forgotten, with which the trained one is compared."""
        del spec
        return (_UNSEEN,)

    @classmethod
    def measured_by(cls, spec: RunSpec) -> dict[str, Mode]:
        """See :meth:`Task.measured_by`; the distance to a model that never saw, where one is named."""
        further: dict[str, Mode] = {"eval/membership_distance": "min"} if _UNSEEN in spec.roles else {}
        return {**super().measured_by(spec), **further}

    def completed(self, batch: Batch, companions: Callable[[Batch, str], dict[str, Outputs]]) -> Batch:
        """Return a batch with what a model that never saw them says of the answers."""
        if _UNSEEN not in self.run.roles:
            return batch
        outputs = companions(batch, "inputs")[_UNSEEN]
        targets = batch["targets"].to(outputs.hidden.device)
        return {**batch, _UNSEEN: answer_log_probabilities(outputs, targets, impl=self.run.loss.impl)}

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return of each set nats, tokens, right answers and answers; probabilities; nats of the unseen."""
        del own
        targets = batch["targets"]
        sums: list[Tensor | float] = []
        for place in (FORGET, RETAIN):
            own_targets = targets[:, place]
            rows = rows_of(outputs.at((slice(None), place)), own_targets, impl=self.run.loss.impl)
            target, lse, predicted = rows(Target(), LogSumExp(), Predicted())
            log_p, valid = (target - lse).sum(-1).double(), rows.valid
            sums += [-log_p.sum(), valid.sum(), *right_answers(predicted, own_targets)]
            if place == FORGET:
                sums.append((log_p.exp() * valid.any(-1)).sum())
        unseen = batch.get(_UNSEEN)
        sums.append(0.0 if unseen is None else -unseen[:, FORGET].double().sum())
        return as_sums(*sums, like=outputs.hidden)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        nats, tokens, right, answers, mass, kept, of_kept, right_kept, all_kept, unseen = sums.tolist()
        found = {
            "eval/forget_accuracy": right / max(answers, 1.0),
            "eval/retain_accuracy": right_kept / max(all_kept, 1.0),
            "eval/forget_probability": mass / max(answers, 1.0),
            "eval/forget_cross_entropy": nats / max(tokens, 1.0),
            "eval/retain_cross_entropy": kept / max(of_kept, 1.0),
        }
        if _UNSEEN in self.run.roles:
            found["eval/membership_distance"] = abs(nats - unseen) / max(tokens, 1.0)
        return found, {}


class MaskedRows:
    """Rows with the same masked classes beside each.

    Args:
        rows: What they are of.
        masked: Classes, int64 (M,).
    """

    def __init__(self, rows: AnswerRows, masked: np.ndarray) -> None:
        self._rows, self._masked = rows, torch.from_numpy(masked)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """See :meth:`AnswerRows.batch`, with ``masked_classes`` (B, M)."""
        return {**self._rows.batch(rows), _MASKED: self._masked.expand(len(rows), -1)}


def side_by_side(forget: Sequence[AnswerRecord], retain: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Return rows of what is to be forgotten, what is to stay, and a wrong answer instead of the first.

    The wrong answer is that to the next prompt that is to be forgotten. Where one set is longer, rows lack
    a candidate.

    Raises:
        UserError: A prompt is in both sets, or there is no other answer that could be the wrong one.
    """
    if len(forget) < 2:
        raise UserError(f"data.forget: holds {len(forget)} answer; there must be two at least")
    kept = {text_of(asked(record.candidates[0])): record.place for record in retain}
    for record in forget:
        if text_of(asked(record.candidates[0])) in kept:
            there = kept[text_of(asked(record.candidates[0]))]
            raise UserError(
                f"{record.place}: its prompt is also to stay ({there}); a prompt belongs to one set"
            )
    rows = []
    for place, (gone, stays) in enumerate(zip_longest(forget, retain)):
        own: Example = () if gone is None else gone.candidates[0]
        instead: Example = ()
        if gone is not None:
            instead = (*asked(own), *answer_of(forget[(place + 1) % len(forget)].candidates[0]))
        candidates = (own, () if stays is None else stays.candidates[0], instead)
        rows.append(
            AnswerRecord(" and ".join(one.place for one in (gone, stays) if one is not None), candidates)
        )
    return rows
