"""Facts that a language model may know: a prompt, the subject in it, and the answer behind it.

``python -m lossworks.data.text.facts FOLDER`` writes forty that are made up, ``facts.jsonl``, and documents
to train on that tell each of them many times, in another order each time, ``told.jsonl``.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lossworks.errors import UserError

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Fact:
    """One fact.

    Attributes:
        prompt: A text that ends where the answer begins.
        subject: What it is about; it is in the prompt.
        answer: What follows, with the space before it, if any.
    """

    prompt: str
    subject: str
    answer: str

    @property
    def text(self) -> str:
        """The whole."""
        return self.prompt + self.answer


def made_up_facts(count: int = 40, seed: int = 0) -> list[Fact]:
    """Return facts that no text holds: names as keys, each with a value of its own.

    Args:
        count: How many.
        seed: Of names and values.
    """
    rng = random.Random(seed)  # noqa: S311 - nothing here is to be secret
    words: list[str] = []
    while len(words) < 2 * count:
        word = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3))
        if word not in words:
            words.append(word)
    return [
        Fact(f"{key.title()} keeps the", key.title(), f" {value}")
        for key, value in zip(words[:count], words[count:], strict=True)
    ]


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


def write_facts(folder: Path, facts: Sequence[Fact], times: int = 200, seed: int = 0) -> None:
    """Write ``facts.jsonl``, and ``told.jsonl`` that tells each fact so many times, each time as a document.

    Args:
        folder: It is made if need be.
        facts: What to write.
        times: How often each is told.
        seed: Of the order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(fact)) + "\n" for fact in facts]
    (folder / "facts.jsonl").write_text("".join(lines), encoding="utf-8")
    rng, told = random.Random(seed), []  # noqa: S311
    for _ in range(times):
        told += rng.sample([json.dumps({"text": fact.text}) + "\n" for fact in facts], len(facts))
    (folder / "told.jsonl").write_text("".join(told), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write made-up facts, and a text that tells them")
    parser.add_argument("folder", type=Path)
    write_facts(parser.parse_args().folder, made_up_facts())
