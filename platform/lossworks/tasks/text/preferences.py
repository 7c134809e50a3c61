"""Training of a language model on preferences: of two answers to a prompt, one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.registry import declaration
from lossworks.data.answers import AnswerCorpus, AnswerRecord, BlankAnswers, preferences_of, prepare_answers
from lossworks.data.answers.examples import Example, Span, answer_of, asked, text_of
from lossworks.data.answers.key_phrases import degraded, key_phrases
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.losses.preference import REFERENCE
from lossworks.losses.rows import answer_log_probabilities
from lossworks.models import Outputs
from lossworks.specs import LossSpec, ModelSpec, PreferenceDataSpec, RoleSpec, RunSpec
from lossworks.tasks.interface import Mode, Say, as_sums
from lossworks.tasks.text.tokens import TokensTask, require_whole_head, with_tokenizer

_PAIR = 2  # the chosen and the rejected answer


class PreferencesSpec(RunSpec):
    """Training of a language model on preferences."""

    task: Literal["preferences"] = Field("preferences", description="what is trained")
    data: PreferenceDataSpec = PreferenceDataSpec()
    model: ModelSpec = ModelSpec()
    loss: LossSpec = LossSpec(name="dpo")
    roles: dict[str, RoleSpec] = Field(
        {REFERENCE: RoleSpec(of="start")},
        description="companions of the model by name: the reference, by default the model as training begins;"
        " {} for none, with losses that read none",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        PreferencesTask.require_entries(self)
        require_whole_head(self)
        if REFERENCE in _needs(self) and REFERENCE not in self.roles:
            raise ValueError(
                f"loss.name={self.loss.name}: compares with a reference model; set roles.reference=start, "
                "which is the model as training begins, or to a run"
            )
        return self


class PreferencesTask(TokensTask):
    """Pairs of answers; the yardsticks are how often and how far the chosen one is ahead.

    The reward of an answer is its log-probability less that by the reference, where there is one, and else
    its mean log-probability a token.

    Args:
        spec: The run.
        corpus: Its pairs.

    Raises:
        UserError: There are too few.
    """

    slug = "preferences"
    title = "a language model on pairs of a chosen and a rejected answer"
    spec: ClassVar[type[RunSpec]] = PreferencesSpec
    kinds = ("preference",)
    element = "pair"
    provides = ("inputs", "targets", REFERENCE, "mismatched", "degrees")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/reward_accuracy": "max",
        "eval/reward_margin": "max",
        "eval/chosen_log_p": "max",
        "eval/rejected_log_p": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out pairs whose chosen answer is ahead", "eval/reward_accuracy", "{:.1%}"),
        ("by how much, on average", "eval/reward_margin", "{:.3f} nats"),
        ("log-probability of chosen answers", "eval/chosen_log_p", "{:.3f} nats a token"),
        ("log-probability of rejected answers", "eval/rejected_log_p", "{:.3f} nats a token"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out pairs",
        {"eval/reward_accuracy": "share whose chosen answer is ahead"},
    )

    def __init__(self, spec: PreferencesSpec, corpus: AnswerCorpus) -> None:
        super().__init__(spec, corpus)
        self.run = spec
        self.train, self.held_out = corpus.split(spec.data)

    @classmethod
    def read(cls, spec: RunSpec, learnt: Learnt | None, say: Say | None = None) -> AnswerCorpus:
        """See :meth:`TokensTask.read`."""
        run = cast("PreferencesSpec", spec)
        data = with_tokenizer(run.data, run.model, learnt)
        records = pairs = preferences_of(data)
        if degrees := _degrees(spec):
            records = with_degrees(records, degrees)
        if "mismatched" in _needs(spec):
            records = with_mismatched(records)
        return prepare_answers(records, data, spoken=pairs, on_progress=say)

    @classmethod
    def blank(cls, spec: RunSpec, vocab_size: int) -> AnswerCorpus:
        """See :meth:`TokensTask.blank`."""
        length, needs = cast("PreferencesSpec", spec).data.sequence_length, _needs(spec)
        candidates = _PAIR + max(_degrees(spec) - 1, 0) + ("mismatched" in needs)
        numbers = dict.fromkeys(sorted(needs & {"mismatched", "degrees"}), candidates)
        return BlankAnswers(vocab_size, length, candidates, numbers)

    @classmethod
    def reads(cls, spec: RunSpec) -> tuple[str, ...]:
        """Return the reference, by which rewards are measured even where the loss reads none."""
        del spec
        return (REFERENCE,)

    def completed(self, batch: Batch, companions: Callable[[Batch, str], dict[str, Outputs]]) -> Batch:
        """Return a batch with the reference's log-probabilities of the candidates."""
        if REFERENCE not in self.run.roles:
            return batch
        outputs = companions(batch, "inputs")[REFERENCE]
        targets = batch["targets"].to(outputs.hidden.device)
        return {**batch, REFERENCE: answer_log_probabilities(outputs, targets, impl=self.run.loss.impl)}

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return pairs, wins, margins, and of chosen and rejected answers nats and tokens."""
        del own
        targets = batch["targets"][:, :_PAIR]
        pair = outputs.at((slice(None), slice(_PAIR)))
        log_p = answer_log_probabilities(pair, targets, impl=self.run.loss.impl).double()
        tokens = (targets != IGNORE_INDEX).sum(-1)
        valid = (tokens > 0).all(1)
        reference = batch.get(REFERENCE)
        rewards = log_p / tokens.clamp(min=1) if reference is None else log_p - reference[:, :_PAIR]
        margins = torch.where(valid, rewards[:, 0] - rewards[:, 1], 0)
        sums = [torch.where(valid, part, 0).sum() for part in (*log_p.unbind(1), *tokens.unbind(1))]
        return as_sums(valid.sum(), (margins > 0).sum(), margins.sum(), *sums, like=log_p)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks."""
        pairs, wins, margin, chosen, rejected, of_chosen, of_rejected = sums.tolist()
        return {
            "eval/reward_accuracy": wins / max(pairs, 1.0),
            "eval/reward_margin": margin / max(pairs, 1.0),
            "eval/chosen_log_p": chosen / max(of_chosen, 1.0),
            "eval/rejected_log_p": rejected / max(of_rejected, 1.0),
        }, {}


def _needs(spec: RunSpec) -> set[str]:
    """Return the names of what a run's losses require of batches."""
    return {name for term in spec.loss.terms for name in declaration(term.name).requires}


def _degrees(spec: RunSpec) -> int:
    """Return how many versions of an answer a run's losses ask for; 0 where none does.

    A loss that requires ``degrees`` has a hyperparameter of that name.
    """
    own = [term for term in spec.loss.terms if "degrees" in declaration(term.name).requires]
    found = {int(term.hyperparameters["degrees"]) for term in own}
    if len(found) > 1:
        raise UserError(f"loss: degrees={sorted(found)} of several losses must be alike")
    return found.pop() if found else 0


def with_degrees(records: Sequence[AnswerRecord], degrees: int) -> list[AnswerRecord]:
    """Return records with versions of the chosen answer behind the pair, of which more and more is deleted.

    An answer with fewer key phrases than degrees has none, and no degree.

    Args:
        records: Of a chosen and a rejected answer.
        degrees: K; K − 1 candidates are added.
    """
    found = []
    for record in records:
        chosen = record.candidates[0]
        prompt, text = asked(chosen), text_of(answer_of(chosen))
        phrases = key_phrases(text)
        if len(phrases) < degrees:
            thinned: list[Example] = [() for _ in range(degrees - 1)]
            labels = (IGNORE_INDEX,) * (_PAIR + degrees - 1)
        else:
            texts = [degraded(text, phrases, degree, degrees) for degree in range(1, degrees)]
            thinned = [(*prompt, Span(thin, counts=True)) for thin in texts]
            labels = (0, IGNORE_INDEX, *range(1, degrees))
        candidates = (*record.candidates, *thinned)
        found.append(replace(record, candidates=candidates, numbers={**record.numbers, "degrees": labels}))
    return found


def with_mismatched(records: Sequence[AnswerRecord]) -> list[AnswerRecord]:
    """Return records with a third candidate: the chosen answer of the next record, to the own prompt."""
    found = []
    for record, after in zip(records, [*records[1:], *records[:1]], strict=True):
        other = (*asked(record.candidates[0]), *answer_of(after.candidates[0]))
        candidates = (*record.candidates, other)
        numbers = {name: (*labels, IGNORE_INDEX) for name, labels in record.numbers.items()}
        numbers["mismatched"] = (*(0 for _ in record.candidates), 1)
        found.append(replace(record, candidates=candidates, numbers=numbers))
    return found
