"""Records as tokens in a folder of the cache, and the batches that training reads.

N records of C candidates, L tokens a sequence, V entries of the vocabulary.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lossworks.data.answers.examples import AnswerRecord, Example, text_of
from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.order import held_out_of
from lossworks.data.text.corpus_folder import CorpusFolder
from lossworks.data.text.preparation import make_folder, opened_cache, say_nothing, tokenizer_file
from lossworks.data.text.token_shards import BYTES_FILE, TOKENIZER_FILE
from lossworks.data.text.tokenizer import (
    encode_texts,
    end_of_text_id,
    line_ends,
    load_tokenizer,
    special_ids,
    token_bytes,
    train_on,
    vocabulary_size,
)
from lossworks.errors import UserError
from lossworks.files import reading
from lossworks.specs import TokensSpec

_FORMAT = 1
_INDEX, _TOKENS, _COUNTED, _ENDS = "answers.json", "tokens.npy", "counted.npy", "ends.npy"
_PADDED_TO = 8  # lengths of batches are multiples of it, which products like
_NAMED = 3  # records that a message names
_BLANK, _BLANK_CLASSES = 1024, 32

EncodedExample = tuple[np.ndarray, np.ndarray]
"""Tokens (T,) int64, and which of them count, bool (T,)."""


def prepare_answers(
    records: Sequence[AnswerRecord],
    spec: TokensSpec,
    *,
    packed: bool = False,
    spoken: Sequence[AnswerRecord] | None = None,
    cache: Path | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> "AnswerCorpus":
    """Return records as tokens, encoded now or found in the cache, which goes by content.

    A sequence begins with the token that ends the text before it, where the tokenizer has one, and one that
    ends with an answer ends with that token, which counts. Records of which a candidate is longer than
    ``spec.sequence_length`` tokens are left out, counted and named.

    Args:
        records: All with as many candidates, and numbers of the same names.
        spec: How text becomes tokens.
        packed: Put several examples into a sequence; they have one candidate.
        spoken: On whose text a tokenizer is trained, where none is given; the records themselves if None.
        cache: Folder to keep tokens in; by default ``lossworks.home.cache_folder()``.
        on_progress: Called with a line of text now and then.

    Raises:
        UserError: The tokenizer can't be read, or no record fits.
    """
    cache, say = opened_cache(cache), on_progress or say_nothing
    digest, spoken = _digest(records), records if spoken is None else spoken
    texts = [text_of(example) for record in spoken for example in record.candidates]
    tokenizer = tokenizer_file(
        spec, cache, say, digest=lambda: _digest(spoken), train=lambda: train_on(texts, spec)
    )
    key = _key(digest, hashlib.sha256(tokenizer).hexdigest(), spec.sequence_length, packed)
    folder = cache / f"answers-{key}"
    if not _is_there(folder):
        fill = functools.partial(_fill, records, spec, tokenizer, digest, packed)
        make_folder(folder, fill, _is_there)
    corpus = AnswerCorpus.open(folder)
    for line in corpus.notes:
        say(line)
    return corpus


class AnswerCorpus(CorpusFolder):
    """Records of prompts and answers as tokens, in a folder.

    Attributes:
        vocab_size: Ids run from 0 to ``vocab_size - 1``.
        end_of_text: Id of the token that ends a text, or None.
        fingerprint: Digest of the records.
        records: N.
        candidates: C.
        notes: What a person should know of it, in a sentence each.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.vocab_size: int = index["vocab_size"]
        self.end_of_text: int | None = index["end_of_text"]
        self.fingerprint: str = index["fingerprint"]
        self.candidates: int = index["candidates"]
        self.notes: list[str] = index["notes"]
        self._tokens, self._counted, self._ends = (
            np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (_TOKENS, _COUNTED, _ENDS)
        )
        self.numbers = {
            name: np.load(folder / f"numbers-{name}.npy", allow_pickle=False) for name in index["numbers"]
        }
        self.records = (len(self._ends) - 1) // self.candidates

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Return what :func:`prepare_answers` has made in a folder.

        Raises:
            UserError: It is missing or damaged.
        """
        path = Path(folder).absolute()
        with reading(path):
            index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
            if index.get("format") != _FORMAT:
                raise UserError(f"{path}: has format {index.get('format')}; must be {_FORMAT}; remove it")
            return cls(path, index)

    def line_ends(self) -> np.ndarray:
        """Return which tokens hold the end of a line, bool (V,)."""
        return line_ends(self.tokenizer_path, self.vocab_size)

    def sequence(self, record: int, candidate: int = 0) -> EncodedExample:
        """Return the tokens of an example, and which of them count; empty where there is none."""
        place = record * self.candidates + candidate
        part = slice(int(self._ends[place]), int(self._ends[place + 1]))
        return self._tokens[part].astype(np.int64), self._counted[part].astype(bool)

    def all(self) -> "AnswerRows":
        """Return all records."""
        return AnswerRows(self, 0, self.records)

    def split(self, spec: TokensSpec) -> tuple["AnswerRows", "AnswerRows"]:
        """Return the records to train on and the held-out ones from the end, at least one of each.

        Raises:
            UserError: There is only one record.
        """
        if self.records < 2:
            raise UserError(
                f"data: only {self.records} record fits; there must be two, one to train on, one held out"
            )
        held_out = held_out_of(self.records, spec.held_out_fraction)
        train = self.records - held_out
        return AnswerRows(self, 0, train), AnswerRows(self, train, held_out)

    def classes_of(self, candidate: int) -> np.ndarray:
        """Return the tokens that count in a candidate of any record, without special ones, int64 (M,)."""
        parts = [self.sequence(record, candidate) for record in range(self.records)]
        tokens = np.unique(np.concatenate([tokens[counted] for tokens, counted in parts]))
        found: np.ndarray = np.setdiff1d(tokens, special_ids(load_tokenizer(self.tokenizer_path)))
        return found


class BlankAnswers(AnswerCorpus):
    """Answers without a text, for what asks for the shapes of batches alone: all are as long as may be.

    Args:
        vocab_size: V.
        length: L.
        candidates: C.
        numbers: How many numbers a record has, by name.
    """

    def __init__(self, vocab_size: int, length: int, candidates: int, numbers: Mapping[str, int]) -> None:
        self.folder = Path()
        self.vocab_size, self.end_of_text = vocab_size, 0
        self.fingerprint, self.notes = "", []
        self.candidates, self.records = candidates, _BLANK
        self.numbers = {name: np.zeros((_BLANK, count), dtype=np.int64) for name, count in numbers.items()}
        self._length = length

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (V,) int64: one."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def line_ends(self) -> np.ndarray:
        """Return which tokens hold the end of a line, bool (V,): none."""
        return np.zeros(self.vocab_size, dtype=bool)

    def sequence(self, record: int, candidate: int = 0) -> EncodedExample:
        """Return the first token of the vocabulary, again and again."""
        del record, candidate
        return np.zeros(self._length + 1, dtype=np.int64), np.ones(self._length + 1, dtype=bool)

    def classes_of(self, candidate: int) -> np.ndarray:
        """Return some tokens, int64 (M,)."""
        del candidate
        return np.arange(_BLANK_CLASSES)


class AnswerRows:
    """Some records of a corpus as batches.

    Args:
        corpus: Where the tokens lie.
        first: Its first record.
        count: How many.
        ends: Which tokens end a step, bool (V,); None for no steps.
    """

    def __init__(self, corpus: AnswerCorpus, first: int, count: int, ends: np.ndarray | None = None) -> None:
        self.corpus, self._first, self._count, self._ends = corpus, first, count, ends

    def with_steps(self, ends: np.ndarray) -> "AnswerRows":
        """Return the same with ``segments`` in their batches: which step each target belongs to."""
        return AnswerRows(self.corpus, self._first, self._count, ends)

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``inputs`` and ``targets`` (B, L) int64, of C > 1 candidates (B, C, L), and the numbers.

        Targets of what doesn't count are -100, as are those of the padding behind shorter sequences; L is
        the longest of these sequences, up to a multiple of 8.
        """
        corpus, candidates = self.corpus, self.corpus.candidates
        records = [self._first + int(row) for row in rows]
        found = [corpus.sequence(record, place) for record in records for place in range(candidates)]
        longest = max([2, *(len(tokens) - 1 for tokens, _ in found)])
        length = -(-longest // _PADDED_TO) * _PADDED_TO
        inputs = np.zeros((len(found), length), dtype=np.int64)
        targets = np.full((len(found), length), IGNORE_INDEX, dtype=np.int64)
        for index, (tokens, counted) in enumerate(found):
            if len(tokens) > 1:
                inputs[index, : len(tokens) - 1] = tokens[:-1]
                targets[index, : len(tokens) - 1] = np.where(counted[1:], tokens[1:], IGNORE_INDEX)
        batch = {"inputs": torch.from_numpy(inputs), "targets": torch.from_numpy(targets)}
        if self._ends is not None:
            batch["segments"] = torch.from_numpy(_steps(targets, self._ends))
        if candidates > 1:
            batch = {name: value.unflatten(0, (-1, candidates)) for name, value in batch.items()}
        numbers = {name: torch.from_numpy(values[records]) for name, values in corpus.numbers.items()}
        return {**batch, **numbers}


def _steps(targets: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return which step each target belongs to, numbered over the batch."""
    ending = ends[np.maximum(targets, 0)] & (targets != IGNORE_INDEX)
    within = ending.cumsum(1) - ending
    found: np.ndarray = within + np.arange(len(targets))[:, None] * targets.shape[1]
    return found


def _is_there(folder: Path) -> bool:
    return (folder / _INDEX).is_file()


def _fill(
    records: Sequence[AnswerRecord],
    spec: TokensSpec,
    tokenizer: bytes,
    digest: str,
    packed: bool,
    folder: Path,
) -> None:
    """Fill the folder of a corpus; the index is written last."""
    (folder / TOKENIZER_FILE).write_bytes(tokenizer)
    loaded = load_tokenizer(folder / TOKENIZER_FILE)
    fitting, notes = _fitting(records, spec.sequence_length, loaded)
    kept = [record for record, _ in fitting]
    sequences = [sequence for _, found in fitting for sequence in found]
    if packed:
        before, sequences = len(sequences), _packed(sequences, spec.sequence_length)
        notes.append(f"{before:,} examples stand in {len(sequences):,} sequences")
    lengths = [len(tokens) for tokens, _ in sequences]
    np.save(folder / _ENDS, np.cumsum([0, *lengths]).astype(np.int64))
    np.save(folder / _TOKENS, np.concatenate([tokens for tokens, _ in sequences]).astype(np.uint32))
    np.save(folder / _COUNTED, np.concatenate([counted for _, counted in sequences]))
    names = [] if packed else sorted(kept[0].numbers)
    for name in names:
        values = np.array([record.numbers[name] for record in kept], dtype=np.int64)
        np.save(folder / f"numbers-{name}.npy", values)
    sizes = token_bytes(loaded)
    np.save(folder / BYTES_FILE, _average(records, lengths, loaded) if sizes is None else sizes)
    index = {
        "format": _FORMAT,
        "vocab_size": vocabulary_size(loaded),
        "end_of_text": end_of_text_id(loaded),
        "fingerprint": digest,
        "candidates": len(kept[0].candidates),
        "numbers": names,
        "notes": notes,
    }
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


def _fitting(
    records: Sequence[AnswerRecord], length: int, tokenizer: Any
) -> tuple[list[tuple[AnswerRecord, list[EncodedExample]]], list[str]]:
    """Return the records that are short enough, with their sequences, and notes on the others."""
    encoded = _encoded([example for record in records for example in record.candidates], tokenizer)
    size = len(records[0].candidates)
    groups = [encoded[start : start + size] for start in range(0, len(encoded), size)]
    pairs = list(zip(records, groups, strict=True))
    fitting = [pair for pair in pairs if all(len(tokens) <= length + 1 for tokens, _ in pair[1])]
    if len(fitting) == len(pairs):
        return fitting, []
    long = [record.place for record, found in pairs if any(len(tokens) > length + 1 for tokens, _ in found)]
    where = "; ".join(long[:_NAMED]) + ("; …" if len(long) > _NAMED else "")
    longest = max(len(tokens) - 1 for tokens, _ in encoded)
    message = (
        f"{len(long):,} of {len(records):,} records are longer than data.sequence_length={length} tokens and "
        f"left out (the longest has {longest:,}): {where}"
    )
    if not fitting:
        raise UserError(f"data.sequence_length={length}: no record fits: {message}")
    return fitting, [message]


def _encoded(examples: Sequence[Example], tokenizer: Any) -> list[EncodedExample]:
    """Return the tokens of examples, and which of them count; spans are encoded each by itself."""
    end = end_of_text_id(tokenizer)
    spans = [(place, span) for place, example in enumerate(examples) for span in example]
    tokens = encode_texts(tokenizer, [span.text for _, span in spans])
    parts = ((place, span.counts, found) for (place, span), found in zip(spans, tokens, strict=True))
    filled = {place: list(group) for place, group in groupby(parts, key=lambda part: part[0])}
    nothing = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
    return [
        _joined([(counts, found) for _, counts, found in filled[place]], end) if place in filled else nothing
        for place in range(len(examples))
    ]


def _joined(parts: Sequence[tuple[bool, np.ndarray]], end: int | None) -> EncodedExample:
    """Return spans as one sequence, between tokens that end texts."""
    pieces = [(counts, found.astype(np.int64)) for counts, found in parts]
    if end is not None:
        around = np.array([end], dtype=np.int64)
        pieces = [(False, around), *pieces, (pieces[-1][0], around)]
    tokens = np.concatenate([found for _, found in pieces])
    counted = np.concatenate([np.full(len(found), counts) for counts, found in pieces])
    return tokens, counted


def _packed(sequences: Sequence[EncodedExample], length: int) -> list[EncodedExample]:
    """Return sequences one behind the other, as many in each of the new ones as there is room for.

    The token that ends one begins the next, and so stands there once.
    """
    found: list[list[EncodedExample]] = []
    used = length + 2
    for tokens, counted in sequences:
        joins = bool(found) and found[-1][-1][0][-1] == tokens[0]
        own = (tokens[1:], counted[1:]) if joins else (tokens, counted)
        if used + len(own[0]) > length + 1:
            found.append([])
            used, own = 0, (tokens, counted)
        found[-1].append(own)
        used += len(own[0])
    return [
        (np.concatenate([tokens for tokens, _ in group]), np.concatenate([counted for _, counted in group]))
        for group in found
    ]


def _average(records: Iterable[AnswerRecord], lengths: Sequence[int], tokenizer: Any) -> np.ndarray:
    """Return the records' bytes a token, the same for all, of a tokenizer that is not byte-level."""
    text = sum(len(text_of(example).encode()) for record in records for example in record.candidates)
    return np.full(vocabulary_size(tokenizer), text / max(sum(lengths), 1))


def _digest(records: Sequence[AnswerRecord]) -> str:
    """Return a digest of what records hold, 64 hexadecimal digits; where they stand doesn't matter."""
    digest = hashlib.sha256()
    for record in records:
        values = [[list(span) for span in example] for example in record.candidates]
        digest.update(json.dumps([values, dict(record.numbers)], sort_keys=True).encode())
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]
