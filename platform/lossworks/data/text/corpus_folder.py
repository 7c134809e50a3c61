"""What corpora in a folder have in common: their tokenizer, the bytes of its tokens, how they travel."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from lossworks.data.text.token_shards import BYTES_FILE, TOKENIZER_FILE


class CorpusFolder:
    """A corpus that travels between processes as the path of its folder; a subclass has a way to open one.

    Attributes:
        folder: Where the files lie.
    """

    folder: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self).open, (self.folder,))  # type: ignore[attr-defined]  # of the subclass

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json that the corpus was encoded with."""
        return self.folder / TOKENIZER_FILE

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, (V,); 0 for special tokens.

        Of a byte-level tokenizer int64 and exact; of others float64 and the same for all: the corpus's
        average. Either way the tokens of a corpus add up to the bytes of its text.
        """
        sizes: np.ndarray = np.load(self.folder / BYTES_FILE, allow_pickle=False)
        return sizes
