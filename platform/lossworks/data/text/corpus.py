"""A corpus as a stream of documents, and its fingerprint."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lossworks.data.text.corpus_files import PLAIN_SUFFIXES, SourceFile, corpus_files, folder_files
from lossworks.data.text.encodings import OLD, UTF8, encoding_of
from lossworks.data.text.readers import Piece, hub_call, import_datasets, read_file, read_hub
from lossworks.errors import UserError
from lossworks.files import reading
from lossworks.specs import DataSpec

_BLOCK_BYTES = 2**20

OWNERS_BY_PLACE: dict[str, Callable[[str], str]] = {
    "folder": lambda name: name.partition("/")[0],
    "file": lambda name: name,
}
"""Whom a file belongs to, from its path relative to the corpus's root, by what ``data.owner`` says."""


def documents(spec: DataSpec) -> Iterator[Piece]:
    """Return the stream of the corpus's text, cut after ``spec.max_bytes`` bytes of UTF-8.

    A long document comes as several pieces, of which only the last one ends it. Empty documents and
    missing values are left out. A document that ``max_bytes`` cuts is not ended. Nothing larger than one
    piece is held in memory, or one record where the corpus is made of records.

    Raises:
        UserError: The corpus is missing (at once), can't be read, or holds no text (while iterating).
    """
    if spec.corpus.startswith("hf:"):
        pieces = read_hub(spec.corpus.removeprefix("hf:"), spec.field)
    else:
        pieces = _read_files(corpus_files(spec), spec)
    return _not_empty(_limited(pieces, spec.max_bytes), spec)


def fingerprint(spec: DataSpec) -> str:
    """Return a digest of the text that ``documents(spec)`` will give, as 64 hexadecimal digits.

    Files count by name relative to the corpus's root and by content, not by place or date; with
    ``max_bytes`` only what is read counts. A data set on the hub counts by its name and by the hash the
    datasets library gives its revision.

    Raises:
        UserError: The corpus is missing or can't be read.
    """
    digest = hashlib.sha256()
    _add(digest, json.dumps([spec.corpus.partition(":")[0], spec.field, spec.max_bytes]).encode())
    hub_name = spec.corpus.removeprefix("hf:") if spec.corpus.startswith("hf:") else None
    if hub_name is None:
        _add_files(digest, corpus_files(spec), spec.max_bytes)
    elif Path(hub_name).is_dir():
        _add_files(digest, folder_files(Path(hub_name)), None)
    else:
        _add(digest, json.dumps([hub_name, *_hub_revision(hub_name)]).encode())
    return digest.hexdigest()


def other_encodings(spec: DataSpec) -> list[str]:
    """Return the names of the corpus's files that are not UTF-8, each with the encoding it is read in.

    Raises:
        UserError: The corpus is missing or can't be read.
    """
    if spec.corpus.startswith("hf:") or spec.corpus == "stdlib":
        return []
    texts = [file for file in corpus_files(spec) if file.path.suffix.lower() != ".parquet"]
    found = [(file.name, _encoding(file.path)) for file in texts]
    return [f"{name} ({encoding})" for name, encoding in found if encoding not in (UTF8, "utf-8-sig")]


def utf8_size(text: str) -> int:
    """Return the number of bytes of ``text`` in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def _read_files(files: Iterable[SourceFile], spec: DataSpec) -> Iterator[Piece]:
    of_place = OWNERS_BY_PLACE.get(spec.owner or "")
    of_records = spec.owner if of_place is None else None
    for file in files:
        for piece in read_file(file.path, spec.field, of_records):
            yield piece if of_place is None else piece._replace(owner=of_place(file.name))


def _limited(pieces: Iterator[Piece], max_bytes: int | None) -> Iterator[Piece]:
    if max_bytes is None:
        yield from pieces
        return
    left = max_bytes
    for piece in pieces:
        size = utf8_size(piece.text)
        if size > left:
            # A character that the limit cuts in two is left out.
            start = piece.text.encode()[:left].decode(errors="ignore")
            if start:
                yield Piece(start, ends_document=False, owner=piece.owner)
            return
        yield piece
        left -= size
        if not left:
            return


def _not_empty(pieces: Iterator[Piece], spec: DataSpec) -> Iterator[Piece]:
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        limit = "" if spec.max_bytes is None else f" within data.max_bytes={spec.max_bytes}"
        raise UserError(f"data.corpus={spec.corpus!r}: holds no text{limit}")


def _add_files(digest: Any, files: Iterable[SourceFile], max_bytes: int | None) -> None:
    """Add the names and contents of files, as far as ``max_bytes`` of text can reach.

    A file of plain text in UTF-8 or Windows-1252 has no more bytes than its text in UTF-8; records and other
    encodings may have more, so their files count as a whole and take nothing off the limit.
    """
    left = max_bytes
    for file in files:
        plain = file.path.suffix.lower() in PLAIN_SUFFIXES and _encoding(file.path) in (UTF8, OLD)
        _add(digest, file.name.encode("utf-8", errors="surrogateescape"))
        # Four bytes more, because a character cut in two reads differently with what follows it.
        size = _add_content(digest, file.path, left + 4 if plain and left is not None else None)
        if plain and left is not None:
            left -= size
            if left <= 0:
                return


def _encoding(path: Path) -> str:
    with reading(path):
        return encoding_of(path)


def _add_content(digest: Any, path: Path, limit: int | None) -> int:
    """Add up to ``limit`` bytes of a file and return how many there were."""
    content = hashlib.sha256()
    size = 0
    with reading(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES if limit is None else min(_BLOCK_BYTES, limit - size)):
            content.update(block)
            size += len(block)
    digest.update(content.digest())
    return size


def _add(digest: Any, value: bytes) -> None:
    """Add a value after its length, so that no two sequences of values read the same."""
    digest.update(len(value).to_bytes(8, "little") + value)


def _hub_revision(name: str) -> list[str]:
    where = f"data.corpus='hf:{name}'"
    builder = hub_call(where, lambda: import_datasets(where).load_dataset_builder(name))
    return [str(builder.config_id), str(builder.hash)]
