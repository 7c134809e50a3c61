"""A corpus without a text, for what asks for the shapes of batches alone."""

import functools
from pathlib import Path

import numpy as np

from lossworks.data.text.tokenized_corpus import TokenizedCorpus, TokenSequences
from lossworks.specs import DataSpec

_TOKENS = 2**40


class BlankCorpus(TokenizedCorpus):
    """A corpus of one token, again and again, more often than any run reads it; it has no files.

    Args:
        vocab_size: Ids run from 0 to ``vocab_size - 1``.
    """

    def __init__(self, vocab_size: int) -> None:
        self.folder = Path()
        self.vocab_size = vocab_size
        self.tokens = self.text_bytes = _TOKENS
        self.documents = 0
        self.end_of_text = 0
        self.fingerprint = ""

    def split(self, spec: DataSpec) -> tuple[TokenSequences, TokenSequences]:
        """Return the sequences to train on and the held-out ones, whoever would own them."""
        return super().split(spec.model_copy(update={"owner": None}))

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (V,) int64: one."""
        return np.ones(self.vocab_size, dtype=np.int64)

    def line_ends(self) -> np.ndarray:
        """Return which tokens hold the end of a line, bool (V,): none."""
        return np.zeros(self.vocab_size, dtype=bool)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens, shape (count,), uint16: the first of the vocabulary."""
        del start
        return np.zeros(count, dtype=np.uint16)
