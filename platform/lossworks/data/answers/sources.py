"""From what a spec names to records of prompts and answers."""

from pathlib import Path

from lossworks.data.answers.examples import AnswerRecord, answered
from lossworks.data.answers.facts import facts
from lossworks.data.answers.generated import docstring_pairs, function_names, wrong_docstrings
from lossworks.data.answers.records import read_examples, read_preferences
from lossworks.data.answers.templates import ChatTemplate
from lossworks.specs import DataSpec, PreferenceDataSpec, TokensSpec, UnlearningDataSpec
from lossworks.specs.tasks.text import facts_in


def records_of(spec: DataSpec) -> list[AnswerRecord]:
    """Return the prompts with their answers that a spec names, one candidate each.

    Raises:
        UserError: They can't be read.
    """
    generated = {"docstrings": docstring_pairs, "names": function_names}
    if spec.corpus in generated:
        return generated[spec.corpus]()
    if spec.by_heart:
        return fact_records(facts_in(spec.corpus))
    return list(read_examples(_path(spec.corpus), _template(spec)))


def preferences_of(spec: PreferenceDataSpec) -> list[AnswerRecord]:
    """Return records of a chosen and a rejected answer.

    Raises:
        UserError: They can't be read.
    """
    if spec.corpus == "docstrings":
        return wrong_docstrings()
    return list(read_preferences(_path(spec.corpus), _template(spec)))


def forget_and_retain(spec: UnlearningDataSpec) -> tuple[list[AnswerRecord], list[AnswerRecord]]:
    """Return the examples that are to be forgotten, and those that are to stay.

    Raises:
        UserError: They can't be read.
    """
    if spec.forget is not None and spec.retain is not None:
        template = _template(spec)
        forget, retain = (list(read_examples(_path(text), template)) for text in (spec.forget, spec.retain))
        return forget, retain
    found = fact_records(facts_in(spec.corpus))
    return found[: len(found) // 2], found[len(found) // 2 :]


def fact_records(count: int) -> list[AnswerRecord]:
    """Return made-up facts as records, by the order in which :func:`facts` gives them."""
    return [
        AnswerRecord(f"fact {number}", (answered(fact.prompt, fact.answer),))
        for number, fact in enumerate(facts(count), start=1)
    ]


def _path(text: str) -> Path:
    return Path(text.partition(":")[2]).expanduser()


def _template(spec: TokensSpec) -> ChatTemplate:
    return ChatTemplate.find(spec.chat_template, spec.tokenizer)
