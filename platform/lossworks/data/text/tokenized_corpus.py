"""A prepared corpus, and the sequences it is cut into."""

from copy import copy
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.order import held_out_of
from lossworks.data.text.corpus_folder import CorpusFolder
from lossworks.data.text.owned_tokens import OwnedTokens
from lossworks.data.text.token_shards import Index, TokenShardReader
from lossworks.errors import UserError
from lossworks.specs import DataSpec


class TokenizedCorpus(CorpusFolder):
    """The token ids of a corpus in a folder of memory-mapped shards.

    Opening one reads the index and the sizes of the files; tokens are read when they are asked for. It
    travels between processes as the path of its folder.

    Attributes:
        folder: Where the files lie.
        vocab_size: Ids run from 0 to ``vocab_size - 1``.
        tokens: Number of tokens.
        text_bytes: UTF-8 bytes of text that the tokens stand for.
        documents: Number of documents that ended.
        end_of_text: Id of the token that follows each document, or None.
        fingerprint: Digest of the corpus's content.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.vocab_size = index.vocab_size
        self.tokens = index.tokens
        self.text_bytes = index.text_bytes
        self.documents = index.documents
        self.end_of_text = index.end_of_text
        self.fingerprint = index.fingerprint
        self._reader = TokenShardReader(folder, index)

    @classmethod
    def open(cls, folder: str | Path, *, whole: bool = False) -> Self:
        """Return the corpus in a folder that ``prepare`` made.

        Args:
            folder: Of its files.
            whole: Read all of them, and check that they are what was written.

        Raises:
            UserError: A file is missing, truncated, damaged, or not of this format.
        """
        # Absolute, because a worker may run in another folder.
        path = Path(folder).absolute()
        return cls(path, Index.read(path, whole=whole))

    def line_ends(self) -> np.ndarray:
        """Return which tokens hold the end of a line, bool (V,)."""
        from lossworks.data.text.tokenizer import line_ends

        return line_ends(self.tokenizer_path, self.vocab_size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return a copy of tokens ``start`` to ``start + count - 1``, shape (count,), uint16 or uint32.

        Raises:
            IndexError: Some of them lie outside the corpus.
        """
        return self._reader.read(start, count)

    def split(self, spec: DataSpec) -> "tuple[TokenSequences, TokenSequences]":
        """Return the sequences to train on and the held-out ones from the corpus's end.

        Of n sequences the last ``ceil(held_out_fraction · n)``, at least one, are held out; with
        ``spec.owner`` of each owner's sequences.

        Raises:
            UserError: The corpus has fewer than two sequences of ``spec.sequence_length`` tokens, or no owner
                has two.
        """
        length = spec.sequence_length
        if spec.owner is not None:
            return OwnedSequences.split(self, OwnedTokens.read(self.folder), spec)
        total = (self.tokens - 1) // length
        if total < 2:
            raise UserError(self._too_short(length))
        held_out = held_out_of(total, spec.held_out_fraction)
        train = TokenSequences(self, length, 0, total - held_out)
        return train, TokenSequences(self, length, total - held_out, held_out)

    def _too_short(self, length: int) -> str:
        longest = (self.tokens - 1) // 2
        way_out = f"set it to {longest} or less, or" if longest >= 2 else "no length would do;"
        return (
            f"data.sequence_length={length}: the corpus has only {self.tokens} tokens, less than two "
            f"sequences (one to train on, one held out); {way_out} give it more text"
        )


class TokenSequences:
    """Consecutive sequences of L tokens, each with its targets: the tokens that follow.

    Sequence i of the corpus covers tokens i·L to i·L + L, of which the last is a target only, so
    neighbours share one token.

    Attributes:
        corpus: Where the tokens lie.
        length: L, tokens a sequence.
        owners: Whom each sequence belongs to, (N,) of str; None where nobody asked.
    """

    owners: np.ndarray | None = None

    def __init__(self, corpus: TokenizedCorpus, length: int, first: int, count: int) -> None:
        self.corpus = corpus
        self.length = length
        self._first = first
        self._count = count
        self._ends: np.ndarray | None = None

    def with_steps(self, ends: np.ndarray) -> "TokenSequences":
        """Return the same sequences with ``segments`` in their batches: which step each target belongs to.

        Args:
            ends: Which tokens end a step, bool (V,); such a token belongs to the step that it ends.
        """
        found = copy(self)
        found._ends = ends
        return found

    def __len__(self) -> int:
        return self._count

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the ``inputs`` and ``targets`` of sequences.

        Args:
            rows: Indices of sequences, (B,) integers from 0 to ``len(self) - 1``.

        Returns:
            Both (B, L) int64; ``targets[:, :-1]`` equals ``inputs[:, 1:]``. With steps also ``segments``
            (B, L) int64, numbered over the batch.

        Raises:
            IndexError: A row is out of range.
        """
        blocks = np.empty((len(rows), self.length + 1), dtype=np.int64)
        for block, row in zip(blocks, rows, strict=True):
            if not 0 <= row < self._count:
                raise IndexError(f"row {row} lies outside {self._count} sequences")
            self._fill(block, int(row))
        targets = np.ascontiguousarray(blocks[:, 1:])
        # Behind the end of a text any token will do, since no target counts.
        tokens = np.where(blocks[:, :-1] == IGNORE_INDEX, 0, blocks[:, :-1])
        batch = {"inputs": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}
        if self._ends is not None:
            ends = self._ends[targets] & (targets != IGNORE_INDEX)
            batch["segments"] = torch.from_numpy(
                ends.cumsum(1) - ends + np.arange(len(rows))[:, None] * self.length
            )
        return batch

    def _fill(self, block: np.ndarray, row: int) -> None:
        """Write a sequence's tokens and the one behind them, (L + 1,)."""
        block[:] = self.corpus.read((self._first + row) * self.length, self.length + 1)


class OwnedSequences(TokenSequences):
    """Sequences of L tokens of which each belongs to one owner.

    An owner's documents follow each other in the corpus's order. Its last sequence is filled up with targets
    that don't count.

    Args:
        corpus: Where the tokens lie.
        owned: Whose they are.
        length: L.
        places: Of each sequence the number of its owner and its place among that owner's, int64 (N, 2).
    """

    def __init__(self, corpus: TokenizedCorpus, owned: OwnedTokens, length: int, places: np.ndarray) -> None:
        super().__init__(corpus, length, 0, len(places))
        self._owned, self._places = owned, places
        self.owners = np.array(owned.names)[places[:, 0]]

    @classmethod
    def split(cls, corpus: TokenizedCorpus, owned: OwnedTokens, spec: DataSpec) -> "tuple[Self, Self]":
        """Return each owner's sequences to train on, and those from the end of each that are held out.

        Owners with one sequence train on it.

        Raises:
            UserError: No owner has two sequences.
        """
        length = spec.sequence_length
        train, held_out = [], []
        for owner, tokens in enumerate(owned.sizes()):
            count = -(-max(int(tokens) - 1, 0) // length)
            kept = held_out_of(count, spec.held_out_fraction) if count > 1 else 0
            places = np.stack((np.full(count, owner), np.arange(count)), 1)
            train.append(places[: count - kept])
            held_out.append(places[count - kept :])
        if not sum(map(len, held_out)):
            raise UserError(
                f"data.sequence_length={length}: none of the {len(owned.names)} owners has two sequences "
                "(one to train on, one held out); set it to less"
            )
        return tuple(cls(corpus, owned, length, np.concatenate(parts)) for parts in (train, held_out))  # type: ignore[return-value]

    def _fill(self, block: np.ndarray, row: int) -> None:
        owner, place = self._places[row]
        block[:] = IGNORE_INDEX
        filled = 0
        for start, count in self._owned.ranges(int(owner), int(place) * self.length, self.length + 1):
            block[filled : filled + count] = self.corpus.read(start, count)
            filled += count
