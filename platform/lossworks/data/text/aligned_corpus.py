"""A text cut into tokens twice, and the chunks of bytes that both ways of cutting share.

N rows, L tokens a row, M chunks a row. A chunk is what lies between two neighbouring places at which a token
ends both ways.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.order import held_out_of
from lossworks.data.text.corpus import documents, fingerprint
from lossworks.data.text.corpus_folder import CorpusFolder
from lossworks.data.text.preparation import make_folder, opened_cache, say_nothing, text_tokenizer
from lossworks.data.text.token_shards import BYTES_FILE, TOKENIZER_FILE
from lossworks.data.text.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    vocabulary_size,
)
from lossworks.errors import UserError
from lossworks.files import reading
from lossworks.specs import DataSpec

_FORMAT, _INDEX = 1, "aligned.json"
_SIDES = ("own", "teacher")
_BLANK_ROWS = 1024
_WHITE = b" \t\n\r\x0b\x0c"
NO_CHUNK = -1
"""The chunk of a place that no token takes."""


def prepare_aligned(
    spec: DataSpec,
    teacher_tokenizer: str,
    *,
    cache: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> "AlignedCorpus":
    """Return a text as aligned tokens of two tokenizers, encoded now or found in the cache.

    Args:
        spec: The text, and the tokenizer of the model that is trained.
        teacher_tokenizer: Path of the other ``tokenizer.json``.
        cache: Folder to keep tokens in; by default ``lossworks.home.cache_folder()``.
        on_progress: Called with a line of text now and then.

    Raises:
        UserError: A file can't be read, or the text has fewer than two rows.
    """
    cache, say = opened_cache(cache), on_progress or say_nothing
    load_tokenizer(teacher_tokenizer, setting="data.teacher_tokenizer")
    own = text_tokenizer(spec, cache, say)
    files = {"own": own, "teacher": Path(teacher_tokenizer).expanduser().read_bytes()}
    digests = [hashlib.sha256(files[side]).hexdigest() for side in _SIDES]
    digest = fingerprint(spec)
    key = hashlib.sha256(json.dumps([_FORMAT, digest, digests, spec.sequence_length]).encode())
    folder = cache / f"aligned-{key.hexdigest()[:32]}"
    if not _is_there(folder):
        say("cutting the text into tokens twice")
        make_folder(folder, functools.partial(_fill, spec, files, digest), _is_there)
    corpus = AlignedCorpus.open(folder)
    say(corpus.note)
    return corpus


class AlignedCorpus(CorpusFolder):
    """Rows of a text in the tokens of two tokenizers, in a folder.

    Attributes:
        vocab_size: Entries of the own tokenizer.
        teacher_vocab_size: Entries of the other one.
        end_of_text: Id of the own token that ends a document, or None.
        fingerprint: Digest of the text.
        note: What a person should know of it.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.vocab_size, self.teacher_vocab_size = (int(index["vocab_sizes"][side]) for side in _SIDES)
        self.ends: dict[str, int | None] = index["ends_of_text"]
        self.end_of_text = self.ends["own"]
        self.fingerprint, self.note = str(index["fingerprint"]), str(index["note"])
        self._arrays = {
            f"{side}-{what}": np.load(folder / f"{side}-{what}.npy", mmap_mode="r", allow_pickle=False)
            for side in _SIDES
            for what in ("tokens", "chunks", "rows")
        }
        self.starts_a_word = {
            side: torch.from_numpy(np.load(folder / f"{side}-words.npy", allow_pickle=False))
            for side in _SIDES
        }

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Return what :func:`prepare_aligned` has made in a folder.

        Raises:
            UserError: It is missing or damaged.
        """
        path = Path(folder).absolute()
        with reading(path):
            return cls(path, json.loads((path / _INDEX).read_text(encoding="utf-8")))

    @property
    def rows(self) -> int:
        """How many rows there are, N."""
        return len(self._arrays["own-rows"]) - 1

    def side(self, side: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens of a row by one tokenizer, and the chunk of each, int64 (L,)."""
        place = self._arrays[f"{side}-rows"]
        part = slice(int(place[row]), int(place[row + 1]))
        return (
            self._arrays[f"{side}-tokens"][part].astype(np.int64),
            self._arrays[f"{side}-chunks"][part].astype(np.int64),
        )

    def split(self, spec: DataSpec) -> tuple["AlignedRows", "AlignedRows"]:
        """Return the rows to train on and the held-out ones from the end, at least one of each.

        Raises:
            UserError: There are fewer than two.
        """
        if self.rows < 2:
            raise UserError(f"data.corpus={spec.corpus}: gives {self.rows} rows; there must be two at least")
        held_out = held_out_of(self.rows, spec.held_out_fraction)
        length, train = spec.sequence_length, self.rows - held_out
        return AlignedRows(self, 0, train, length), AlignedRows(self, train, held_out, length)


class BlankAligned(AlignedCorpus):
    """Rows without a text, for what asks for the shapes of batches alone; both sides are of one kind.

    Args:
        vocab_size: V of both.
        length: L.
    """

    def __init__(self, vocab_size: int, length: int) -> None:
        self.folder = Path()
        self.vocab_size = self.teacher_vocab_size = vocab_size
        self.ends, self.end_of_text = dict.fromkeys(_SIDES, 0), 0
        self.fingerprint = self.note = ""
        self.starts_a_word = {side: torch.ones(vocab_size, dtype=torch.bool) for side in _SIDES}
        self._length = length

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (V,) int64: one."""
        return np.ones(self.vocab_size, dtype=np.int64)

    @property
    def rows(self) -> int:
        """As many as any plan needs."""
        return _BLANK_ROWS

    def side(self, side: str, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first token of the vocabulary again and again, each a chunk."""
        del side, row
        return np.zeros(self._length, dtype=np.int64), np.arange(self._length)


class AlignedRows:
    """Some rows of an aligned corpus as batches."""

    def __init__(self, corpus: AlignedCorpus, first: int, count: int, length: int) -> None:
        self.corpus, self._first, self._count, self._length = corpus, first, count, length

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``inputs``, ``targets`` and ``chunks`` (B, L) int64, and the same of the teacher's tokens.

        A row is a text of its own: its first input is the token that ends the text before, where the
        tokenizer has one; otherwise its first token is read and not predicted. Chunks count from 0 in each
        row.
        """
        batch: dict[str, Tensor] = {}
        for side, prefix in zip(_SIDES, ("", "teacher_"), strict=True):
            shape = (len(rows), self._length)
            inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX, dtype=np.int64)
            chunks = np.full(shape, NO_CHUNK, dtype=np.int64)
            end = self.corpus.ends[side]
            for place, row in enumerate(rows):
                tokens, of_chunk = self.corpus.side(side, self._first + int(row))
                size = len(tokens)
                inputs[place, 1:size] = tokens[:-1]
                inputs[place, 0] = tokens[0] if end is None else end
                targets[place, :size], chunks[place, :size] = tokens, of_chunk
                if end is None:
                    targets[place, 0] = IGNORE_INDEX
            found = {"inputs": inputs, "targets": targets, "chunks": chunks}
            batch |= {f"{prefix}{name}": torch.from_numpy(values) for name, values in found.items()}
        words = self.corpus.starts_a_word["own"]
        return {**batch, "word_classes": words.expand(len(rows), -1)}


def _is_there(folder: Path) -> bool:
    return (folder / _INDEX).is_file()


def _fill(spec: DataSpec, files: dict[str, bytes], digest: str, folder: Path) -> None:
    """Fill the folder of a corpus; the index is written last."""
    names = {"own": TOKENIZER_FILE, "teacher": "teacher.json"}
    tokenizers: dict[str, Any] = {}
    for side, name in names.items():
        (folder / name).write_bytes(files[side])
        tokenizers[side] = load_tokenizer(folder / name)
        np.save(folder / f"{side}-words.npy", word_starts(tokenizers[side]))
    # By side and row: tokens, and their chunks.
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {side: [] for side in _SIDES}
    sizes = {side: token_bytes(tokenizers[side]) for side in _SIDES}
    lost = 0
    for piece in documents(spec):
        own, teacher = (encoded(tokenizers[side], piece.text, side, sizes[side]) for side in _SIDES)
        rows, beyond = aligned(own, teacher, spec.sequence_length)
        lost += beyond
        for row in rows:
            for side, part in zip(_SIDES, row, strict=True):
                found[side].append(part)
    if not found["own"]:
        raise UserError(
            f"data.corpus={spec.corpus}: holds no chunk of at most {spec.sequence_length} tokens, "
            "data.sequence_length"
        )
    for side, parts in found.items():
        np.save(folder / f"{side}-rows.npy", np.cumsum([0, *(len(tokens) for tokens, _ in parts)]))
        for place, (what, dtype) in enumerate((("tokens", np.uint32), ("chunks", np.int32))):
            joined = np.concatenate([part[place] for part in parts]).astype(dtype)
            np.save(folder / f"{side}-{what}.npy", joined)
    own_sizes: Any = sizes["own"]  # there are some, or encoding would have failed
    np.save(folder / BYTES_FILE, own_sizes)
    index = {
        "vocab_sizes": {side: vocabulary_size(tokenizers[side]) for side in _SIDES},
        "ends_of_text": {side: end_of_text_id(tokenizers[side]) for side in _SIDES},
        "fingerprint": digest,
        "note": f"the text gives {len(found['own']):,} rows of aligned tokens"
        + (f"; {lost:,} tokens of chunks longer than a row are left out" if lost else ""),
    }
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def encoded(tokenizer: Any, text: str, side: str, sizes: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a text, int64 (T,), and at which byte of it each ends, int64 (T,).

    Args:
        tokenizer: By which the text is cut.
        text: Any.
        side: Whose tokenizer it is, ``own`` or ``teacher``, for messages.
        sizes: As :func:`lossworks.data.text.tokenizer.token_bytes` gives them for the tokenizer.

    Raises:
        UserError: The tokenizer doesn't stand for the text's bytes one to one.
    """
    tokenizer.encode_special_tokens = True
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    ends = None if sizes is None else sizes[tokens].cumsum()
    if ends is None or (len(ends) and ends[-1] != len(text.encode())):
        setting = "data.tokenizer" if side == "own" else "data.teacher_tokenizer"
        raise UserError(
            f"{setting}: doesn't give back the bytes of a text one to one; chunks are compared by bytes, "
            "which needs a byte-level tokenizer without normalisation, such as that of GPT-2, Llama 3 or Qwen"
        )
    return tokens, ends.astype(np.int64)


def aligned(
    own: tuple[np.ndarray, np.ndarray], teacher: tuple[np.ndarray, np.ndarray], length: int
) -> tuple[list[tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]], int]:
    """Return rows of whole chunks, each with at most ``length`` tokens either way.

    Args:
        own: Tokens (T,) and the bytes at which they end, as :func:`encoded` gives them.
        teacher: The same of the other tokenizer.
        length: L.

    Returns:
        Rows: for each tokenizer tokens and their chunks, which count from 0 in a row; and how many own tokens
        are left out, since their chunk alone is longer than a row.
    """
    ends = np.intersect1d(own[1], teacher[1])
    of_own, of_teacher = (np.searchsorted(ends, side[1]) for side in (own, teacher))
    edges = [np.searchsorted(of, np.arange(len(ends) + 1)) for of in (of_own, of_teacher)]
    rows, lost, first = [], 0, 0
    while first < len(ends):
        # The last chunk that still fits beside the first one.
        last = min(int(np.searchsorted(edge, edge[first] + length, side="right")) - 1 for edge in edges)
        if last <= first:
            lost += int(edges[0][first + 1] - edges[0][first])
            first += 1
            continue
        row = []
        for tokens, of, edge in zip((own[0], teacher[0]), (of_own, of_teacher), edges, strict=True):
            part = slice(int(edge[first]), int(edge[last]))
            row.append((tokens[part], of[part] - first))
        rows.append((row[0], row[1]))
        first = last
    return rows, lost


def word_starts(tokenizer: Any) -> np.ndarray:
    """Return which tokens begin with white space or end a text, bool (V,): those before which a word ends."""
    found = np.zeros(vocabulary_size(tokenizer), dtype=bool)
    for token in range(len(found)):
        text = tokenizer.decode([token], skip_special_tokens=False).encode()
        found[token] = text[:1] in _WHITE and bool(text)
    end = end_of_text_id(tokenizer)
    if end is not None:
        found[end] = True
    return found
