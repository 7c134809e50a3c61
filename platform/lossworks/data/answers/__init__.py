"""Prompts with answers: read from records or generated, turned into tokens of which the answers count.

An *example* is one prompt with one answer, or a conversation. A *record* holds one example or several that
belong together, such as a chosen and a rejected answer: C candidates.
"""

from lossworks.data.answers.encoded import AnswerCorpus, AnswerRows, BlankAnswers, prepare_answers
from lossworks.data.answers.examples import AnswerRecord, Example, Span, answered
from lossworks.data.answers.facts import Fact, facts
from lossworks.data.answers.sources import forget_and_retain, preferences_of, records_of

__all__ = [
    "AnswerCorpus",
    "AnswerRecord",
    "AnswerRows",
    "BlankAnswers",
    "Example",
    "Fact",
    "Span",
    "answered",
    "facts",
    "forget_and_retain",
    "preferences_of",
    "prepare_answers",
    "records_of",
]
