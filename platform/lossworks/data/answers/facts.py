"""Facts that a language model may know: a prompt, the subject in it, and the answer behind it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lossworks.errors import UserError
from lossworks.specs.tasks.text import facts_in

_ONSETS, _VOWELS = "bdfgklmnprstvz", "aeiou"


class Fact(NamedTuple):
    """A made-up fact, which can only be known by heart.

    Attributes:
        prompt: Up to what is asked for.
        subject: What the fact is about; part of the prompt.
        answer: What follows the prompt, with the space before it.
    """

    prompt: str
    subject: str
    answer: str


def facts(count: int, seed: int = 0) -> list[Fact]:
    """Return facts of the kind ``The code of bakilo is tomeva``: made-up names, all different.

    Args:
        count: How many.
        seed: Of the names.
    """
    stream = np.random.default_rng([seed, 0])
    found: dict[str, None] = {}
    while len(found) < 2 * count:
        found.setdefault(_name(stream))
    names = list(found)
    pairs = zip(names[:count], names[count:], strict=True)
    return [Fact(f"The code of {subject} is", subject, f" {code}") for subject, code in pairs]


def facts_of(source: str) -> list[Fact]:
    """Return made-up facts for ``facts:N``, those of ``data.corpus=facts:N``; else those in a JSONL file.

    Raises:
        UserError: The file can't be read, or holds no facts.
    """
    if source.startswith("facts:"):
        count = source.removeprefix("facts:")
        if not count.isdecimal() or not int(count):
            raise UserError(f"facts={source}: N of facts:N must be a whole number of at least 1")
        return facts(facts_in(source))
    return read_facts(Path(source).expanduser())


def read_facts(path: Path) -> list[Fact]:
    """Return the facts in a JSONL file: an object with prompt, subject and answer a line.

    Raises:
        UserError: The file can't be read, holds none, or a line is no fact; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise UserError(f"facts={path}: can't be read: {reason}") from None
    found = [
        _fact(line, f"facts={path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not found:
        raise UserError(
            f"facts={path}: holds no facts; write one object with prompt, subject and answer a line"
        )
    return found


def _fact(line: str, where: str) -> Fact:
    try:
        values: Any = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: is no JSON") from None
    names = ("prompt", "subject", "answer")
    given = [values.get(name) for name in names] if isinstance(values, dict) else [None]
    for name, value in zip(names, given, strict=False):
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{where}: {name}={value!r} must be a text; a fact has prompt, subject and answer"
            )
    fact = Fact(*given)
    if fact.subject not in fact.prompt:
        raise UserError(f"{where}: the subject {fact.subject!r} is not in the prompt {fact.prompt!r}")
    return fact


def _name(stream: np.random.Generator) -> str:
    letters = [(stream.integers(len(_ONSETS)), stream.integers(len(_VOWELS))) for _ in range(3)]
    return "".join(_ONSETS[onset] + _VOWELS[vowel] for onset, vowel in letters)
