"""Records with prompts and answers, from .jsonl and .parquet files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossworks.data.answers.examples import AnswerRecord, answered
from lossworks.data.answers.templates import ChatTemplate
from lossworks.data.text.encodings import encoding_of
from lossworks.data.text.readers import parse_line
from lossworks.errors import UserError
from lossworks.files import reading

_SUFFIXES = (".jsonl", ".parquet")


def read_examples(path: Path, template: ChatTemplate) -> Iterator[AnswerRecord]:
    """Yield a record for each prompt with its answer, or conversation, of a file.

    Args:
        path: ``.jsonl`` or ``.parquet``, whose records have ``prompt`` and ``answer``, or ``messages``.
        template: By which messages become text.

    Raises:
        UserError: The file can't be read, a record lacks a field, or an answer is empty.
    """
    for place, record in _read(path):
        if "messages" in record:
            yield AnswerRecord(place, (template.example(_messages(record, place), place),))
        else:
            prompt, answer = (_text(record, name, place) for name in ("prompt", "answer"))
            yield AnswerRecord(place, (answered(prompt, _filled(answer, "answer", place)),))


def read_preferences(path: Path, template: ChatTemplate) -> Iterator[AnswerRecord]:
    """Yield a record of two candidates, the chosen and the rejected answer, for each prompt of a file.

    Args:
        path: ``.jsonl`` or ``.parquet``, whose records have ``prompt``, ``chosen`` and ``rejected``; the
            prompt may be a list of messages.
        template: By which messages become text.

    Raises:
        UserError: The file can't be read, a record lacks a field, an answer is empty, or both are equal.
    """
    for place, record in _read(path):
        if isinstance(record.get("prompt"), list):
            prompt = template.prompt(record["prompt"], place)
        else:
            prompt = _text(record, "prompt", place)
        chosen, rejected = (
            _filled(_text(record, name, place), name, place) for name in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise UserError(f"{place}: chosen and rejected are equal; a pair must differ to say anything")
        yield AnswerRecord(place, (answered(prompt, chosen), answered(prompt, rejected)))


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each record of a file stands, and what it holds."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{path}: unknown suffix {path.suffix!r}; must be {' or '.join(_SUFFIXES)}")
    empty = True
    with reading(path):
        for place, record in (_jsonl if path.suffix.lower() == ".jsonl" else _parquet)(path):
            empty = False
            yield place, record
    if empty:
        raise UserError(f"{path}: holds no record")


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding=encoding_of(path), errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, parse_line(line, place)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record


def _messages(record: dict[str, Any], place: str) -> list[dict[str, Any]]:
    found = record["messages"]
    if not isinstance(found, list) or not found:
        raise UserError(f"{place}: messages must be a list of objects with role and content")
    return found


def _text(record: dict[str, Any], name: str, place: str) -> str:
    if name not in record:
        raise UserError(f"{place}: lacks {name}; there are: {', '.join(map(str, record)) or 'none'}")
    text = record[name]
    if not isinstance(text, str):
        raise UserError(f"{place}: {name} holds a {type(text).__name__}; must hold text")
    # JSON can spell lone surrogates, and UTF-8 can't.
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


def _filled(text: str, name: str, place: str) -> str:
    if not text.strip():
        raise UserError(f"{place}: {name} is empty; an answer has at least one character")
    return text
