"""The files of a tokenized corpus: shards of token ids, and the index that describes them.

A folder holds ``shard-00000.bin`` and so on (raw little-endian token ids), ``tokenizer.json``,
``token_bytes.npy`` and ``index.json``, which is written last.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from lossworks.errors import UserError
from lossworks.files import reading

SHARD_FORMAT = 2
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"
BYTES_FILE = "token_bytes.npy"

# Token ids are little-endian on every machine, so that a folder can be copied anywhere.
_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class Index(BaseModel):
    """What ``index.json`` says about a folder of shards.

    Attributes:
        format: Version of the layout of the folder.
        fingerprint: Digest of the corpus's content.
        vocab_size: Ids run from 0 to ``vocab_size - 1``.
        end_of_text: Id of the token that follows each document, if there is one.
        dtype: ``uint16`` or ``uint32``.
        tokens: Tokens in all shards together.
        documents: Documents that ended; a document that ``max_bytes`` cut is not counted.
        text_bytes: UTF-8 bytes of text that the tokens stand for.
        shards: Names of the shard files, in order.
        files: Size in bytes of every file of the folder but the index itself.
        digests: SHA-256 of each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    fingerprint: str
    vocab_size: int
    end_of_text: int | None
    dtype: str
    tokens: int
    documents: int
    text_bytes: int
    shards: list[str]
    files: dict[str, int]
    digests: dict[str, str]

    @classmethod
    def read(cls, folder: Path, *, whole: bool = False) -> Self:
        """Return the index of a folder whose files are all there and have the sizes they should have.

        Args:
            folder: What holds it.
            whole: Read all files, and check that they are what was written.

        Raises:
            UserError: A file is missing, truncated, damaged, or not of this format.
        """
        path = folder / INDEX_FILE
        try:
            index = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{folder}: is no tokenized corpus: it holds no {INDEX_FILE}") from None
        except (OSError, ValidationError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: is no index of a tokenized corpus: {reason}") from None
        index._require_known_format(path)
        for name, size in index.files.items():
            _require_size(folder / name, size)
            if whole and digest_of(folder / name) != index.digests.get(name):
                raise UserError(f"{folder / name}: isn't what was written; prepare the data again")
        return index

    def write(self, folder: Path) -> None:
        """Write the index into a folder, as ``index.json``."""
        write_synced(folder / INDEX_FILE, (self.model_dump_json(indent=2) + "\n").encode())

    @property
    def element(self) -> np.dtype[Any]:
        """The dtype of the token ids in the shards."""
        return _DTYPES[self.dtype]

    def shard_lengths(self) -> list[int]:
        """Return the number of tokens of each shard."""
        return [self.files[name] // self.element.itemsize for name in self.shards]

    def _require_known_format(self, path: Path) -> None:
        if self.format != SHARD_FORMAT:
            raise UserError(
                f"{path}: has format {self.format}; must be {SHARD_FORMAT}; prepare the data again"
            )
        known = self.dtype in _DTYPES and set(self.shards) <= set(self.files)
        if not known or sum(self.shard_lengths()) != self.tokens:
            raise UserError(f"{path}: contradicts itself; prepare the data again")


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        UserError: It can't be read.
    """
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def narrowest_dtype(vocab_size: int) -> str:
    """Return the name of the smallest unsigned type that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


class TokenShardWriter:
    """Writes a stream of token ids into shard files of ``shard_tokens`` tokens; the last may be shorter.

    Attributes:
        names: Names of the shards so far.
        tokens: Tokens written so far.
    """

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens={shard_tokens}: must be at least 1")
        self.names: list[str] = []
        self.tokens = 0
        self._folder = folder
        self._element = _DTYPES[dtype]
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def write(self, tokens: np.ndarray | Sequence[int]) -> None:
        """Append token ids, an integer array of shape (T,)."""
        rest = np.asarray(tokens, dtype=self._element)
        while len(rest):
            room = self._shard_tokens - self.tokens % self._shard_tokens
            part, rest = rest[:room], rest[room:]
            self._shard().write(part.tobytes())
            self.tokens += len(part)

    def _shard(self) -> BinaryIO:
        """Return the file to append to: the next one whenever the shards so far are full."""
        if self.tokens == len(self.names) * self._shard_tokens:
            self._close()
            self.names.append(f"shard-{len(self.names):05d}.bin")
            self._file = (self._folder / self.names[-1]).open("wb")
        if self._file is None:
            raise ValueError("the shard writer is closed")
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            _sync(self._file)
            self._file.close()
            self._file = None


class TokenShardReader:
    """Reads token ids across the borders of memory-mapped shards; a file is mapped on first use."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._paths = [folder / name for name in index.shards]
        self._starts = np.cumsum([0, *index.shard_lengths()])
        self._element = index.element
        self._maps: dict[int, np.ndarray] = {}

    def read(self, start: int, count: int) -> np.ndarray:
        """Return a copy of tokens ``start`` to ``start + count - 1``, shape (count,), uint16 or uint32.

        Raises:
            IndexError: Some of them lie outside the corpus.
        """
        stop = start + count
        if start < 0 or count < 0 or stop > self._starts[-1]:
            raise IndexError(f"tokens {start}:{stop} lie outside a corpus of {self._starts[-1]}")
        result = np.empty(count, dtype=self._element)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first, last = int(self._starts[shard]), int(self._starts[shard + 1])
            part = self._map(shard)[start - first : min(stop, last) - first]
            result[count - (stop - start) :][: len(part)] = part
            start += len(part)
            shard += 1
        return result

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=self._element, mode="r")
        return self._maps[shard]


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk, so that a rename never shows an empty one."""
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _require_size(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"{path}: is missing; prepare the data again") from None
    if found != size:
        raise UserError(f"{path}: has {found} bytes, not {size}; prepare the data again")
