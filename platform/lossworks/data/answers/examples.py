"""What a record of prompts and answers is, before it becomes tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Span(NamedTuple):
    """A part of a text.

    Attributes:
        text: Not empty.
        counts: Whether it is an answer, which is trained and measured, or something that is only read.
    """

    text: str
    counts: bool


Example = tuple[Span, ...]
"""A prompt with its answer, or a conversation; the last span of a text that ends with an answer counts."""


@dataclass(frozen=True)
class AnswerRecord:
    """Examples that belong together.

    Attributes:
        place: Where it stands, for messages, such as ``pairs.jsonl, line 3``.
        candidates: C examples, as many in every record; an empty one counts for nothing.
        numbers: Whole numbers of the record by name, as many in every record: shape (M,) each.
    """

    place: str
    candidates: tuple[Example, ...]
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def asked(example: Example) -> Example:
    """Return what of an example is only read: the prompt."""
    return tuple(span for span in example if not span.counts)


def answer_of(example: Example) -> Example:
    """Return what of an example counts: the answer."""
    return tuple(span for span in example if span.counts)


def text_of(example: Example) -> str:
    """Return the whole text of an example."""
    return "".join(span.text for span in example)


def answered(prompt: str, answer: str) -> Example:
    """Return the example of a prompt and its answer; an empty prompt is left out."""
    asked = (Span(prompt, counts=False),) if prompt else ()
    return (*asked, Span(answer, counts=True))
