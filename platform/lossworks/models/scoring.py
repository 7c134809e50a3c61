"""A trained language model asked for the loss of a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import Tokenizer
from torch import Tensor

from lossworks.data.text.tokenizer import encode_texts, end_of_text_id
from lossworks.errors import UserError
from lossworks.head import linear_cross_entropy
from lossworks.models.interface import LanguageModel
from lossworks.models.pretrained import load_model, read_provenance


@dataclass(frozen=True)
class TextScores:
    """How well a model predicts a text.

    Attributes:
        loss: Mean nats a token; NaN where no token could be predicted.
        bits_per_byte: Bits a UTF-8 byte of the predicted text; NaN alike.
    """

    loss: float
    bits_per_byte: float


class TextScorer:
    """A language model with its tokenizer, on the CPU.

    A text is a document of its own: its first token follows the end of the document before, as in training.
    Without such a token in the tokenizer, prediction begins at the second. Long texts are read as in
    evaluation, in consecutive sequences of the length that was trained on, so a sequence's first tokens have
    little before them.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        length: L, tokens a sequence.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, length: int) -> None:
        self._model, self._tokenizer, self.length = model, tokenizer, length
        self._end = end_of_text_id(tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the scorer of a model folder that ``lossworks export`` made.

        Raises:
            UserError: The folder can't be read.
        """
        model, tokenizer = load_model(folder)
        try:
            length = int(read_provenance(folder)["data"]["sequence_length"])
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{folder}: doesn't say which sequence length it was trained on") from None
        return cls(model, tokenizer, length)

    @torch.no_grad()
    def score(self, text: str) -> TextScores:
        """Return loss and bits per byte of a text."""
        tokens = self._encode(text)
        predicted = len(tokens) - 1
        size = len(text.encode()) - (0 if self._end is not None else self._first_bytes(tokens))
        if predicted < 1 or size < 1:
            return TextScores(math.nan, math.nan)
        nats = sum(self._nats(part) for part in self._sequences(tokens))
        return TextScores(nats / predicted, nats / math.log(2) / size)

    def _encode(self, text: str) -> Tensor:
        """Return the tokens (T,) int64 of a text, behind the token that ends the document before."""
        tokens = [int(token) for token in next(iter(encode_texts(self._tokenizer, [text])))]
        return torch.tensor(tokens if self._end is None else [self._end, *tokens], dtype=torch.int64)

    def _first_bytes(self, tokens: Tensor) -> int:
        return len(self._tokenizer.decode(tokens[:1].tolist()).encode())

    def _sequences(self, tokens: Tensor) -> Iterator[Tensor]:
        """Yield sequences (at most L + 1,), of which neighbours share a token, as in training."""
        for start in range(0, len(tokens) - 1, self.length):
            yield tokens[start : start + self.length + 1]

    def _nats(self, tokens: Tensor) -> float:
        """Return the summed loss of tokens (T,) after the first."""
        head = self._model.head()
        hidden = self._model.hidden(tokens[None, :-1])[0]
        nats = linear_cross_entropy(
            hidden, head.weight, tokens[1:], head.bias, softcap=head.softcap, reduction="none"
        )
        return float(torch.as_tensor(nats).double().sum())
