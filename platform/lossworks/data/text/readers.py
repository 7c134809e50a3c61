"""Readers of one file or hub data set each; all give text in pieces of bounded size."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lossworks.data.text.corpus_files import PLAIN_SUFFIXES
from lossworks.data.text.encodings import encoding_of
from lossworks.errors import UserError
from lossworks.files import reading
from lossworks.home import switch_off_usage_reports

# Characters a piece. Smaller ones cost nothing, and a tokenizer's working memory grows with the piece:
# about a hundred bytes a token until the piece is done.
PIECE_CHARACTERS = 2**18


class Piece(NamedTuple):
    """A part of a document, or all of it.

    Attributes:
        text: Never empty, and always valid Unicode.
        ends_document: Whether the document's last character is the last one of ``text``.
        owner: Whom the document belongs to; empty where nobody asked.
    """

    text: str
    ends_document: bool
    owner: str = ""


def read_file(path: Path, field: str, owner: str | None = None) -> Iterator[Piece]:
    """Yield the documents of a file: its lines if it is .jsonl, its rows if .parquet, else one.

    Args:
        path: The file.
        field: Of records, with the text.
        owner: Of records, with whom they belong to; None where nobody asks.

    Raises:
        UserError: The file can't be read, a record lacks a field, or it belongs to nobody.
    """
    with reading(path):
        if path.suffix.lower() in PLAIN_SUFFIXES:
            if owner is not None:
                raise UserError(
                    f"data.owner={owner}: {path} is no file of records (.jsonl, .parquet); use file or folder"
                )
            yield from _read_plain(path)
        else:
            read_records = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_parquet
            for text, whose in read_records(path, field, owner):
                for piece in cut_document(text):
                    yield piece if owner is None else piece._replace(owner=whose)


def read_hub(name: str, field: str) -> Iterator[Piece]:
    """Yield the documents of the train split of a ``datasets`` data set, streamed.

    Raises:
        UserError: The library or the data set can't be had, or a record has no text in ``field``.
    """
    where = f"data.corpus='hf:{name}'"
    load_dataset = import_datasets(where).load_dataset
    rows = iter(hub_call(where, lambda: load_dataset(name, split="train", streaming=True)))
    while (row := hub_call(where, lambda: next(rows, None))) is not None:
        yield from cut_document(_text_field(row, field, where))


def import_datasets(where: str) -> Any:
    """Return the ``datasets`` module, or raise a UserError that begins with ``where``."""
    switch_off_usage_reports()
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where}: needs the datasets library; pip install 'lossworks[hf]'") from None
    return datasets


def hub_call(where: str, call: Callable[[], Any]) -> Any:
    """Return ``call()`` with every failure of the datasets library turned into a UserError.

    Its errors have no common base: a hub that is away, a name nobody has and a broken file come as
    errors of three HTTP libraries, of the operating system, and as ValueErrors.
    """
    try:
        return call()
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{where}: can't be loaded: {type(error).__name__}: {reason}") from error


def cut_document(text: str | None) -> Iterator[Piece]:
    """Yield one document's text in pieces; nothing if it is empty or missing."""
    text = _valid_unicode(text or "")
    blocks = (text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS))
    return _cut_at_lines(blocks)


def _read_plain(path: Path) -> Iterator[Piece]:
    # newline="" keeps \r\n.
    with path.open(encoding=encoding_of(path), errors="replace", newline="") as file:
        yield from _cut_at_lines(iter(lambda: file.read(PIECE_CHARACTERS), ""))


def _cut_at_lines(blocks: Iterable[str]) -> Iterator[Piece]:
    """Yield the text of ``blocks``, cut after the last line end of each block where it has one."""
    rest = ""
    for block in blocks:
        # The piece is held back until more text is seen: only then is it known not to be the last.
        if rest and len(rest) + len(block) > PIECE_CHARACTERS:
            cut = rest.rfind("\n") + 1 or len(rest)
            yield Piece(rest[:cut], ends_document=False)
            rest = rest[cut:]
        rest += block
    if rest:
        yield Piece(rest, ends_document=True)


def _read_jsonl(path: Path, field: str, owner: str | None) -> Iterator[tuple[str | None, str]]:
    # newline="\n": a bare \r is white space to JSON, not the end of a record.
    with path.open(encoding=encoding_of(path), errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                record = parse_line(line, where)
                yield _text_field(record, field, where), _owner_field(record, owner, where)


def parse_line(line: str, where: str) -> dict[str, Any]:
    """Return the record in a line of a .jsonl file.

    Raises:
        UserError: It is none; the message begins with ``where``.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds a {type(record).__name__}; a record is an object with named fields")
    return record


def _read_parquet(path: Path, field: str, owner: str | None) -> Iterator[tuple[str | None, str]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _require_text_column(file.schema_arrow, field, path)
        columns = [field] if owner is None else [field, owner]
        if owner is not None and owner not in file.schema_arrow.names:
            raise UserError(_missing(owner, file.schema_arrow.names, str(path), "column", "owner"))
        # Few rows at once: a row may be a whole book.
        for batch in file.iter_batches(batch_size=64, columns=columns):
            for record in batch.to_pylist():
                yield record[field], _owner_field(record, owner, str(path))


def _require_text_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise UserError(_missing(field, schema.names, str(path), "column"))
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"{path}: data.field={field!r} is a column of {kind}; must be a column of strings")


def _text_field(record: dict[str, Any], field: str, where: str) -> str | None:
    if field not in record:
        raise UserError(_missing(field, list(record), where, "field"))
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: data.field={field!r} holds a {type(text).__name__}; must hold a string")
    return text


def _owner_field(record: dict[str, Any], owner: str | None, where: str) -> str:
    if owner is None:
        return ""
    if owner not in record:
        raise UserError(_missing(owner, list(record), where, "field", "owner"))
    whose = record[owner]
    if isinstance(whose, bool) or not isinstance(whose, str | int) or whose == "":
        raise UserError(f"{where}: data.owner={owner!r} holds {whose!r}; must hold a name or a number")
    return str(whose)


def _missing(field: str, known: list[str], where: str, kind: str, asked: str = "field") -> str:
    return f"{where}: data.{asked}={field!r}: no such {kind}; there are: {', '.join(known) or 'none'}"


def _valid_unicode(text: str) -> str:
    """Return the text with lone surrogates, which JSON can spell and UTF-8 can't, as U+FFFD."""
    return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
