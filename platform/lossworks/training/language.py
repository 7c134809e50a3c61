"""Training of language models: tokens, bits per byte."""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lossworks.data import TokenizedCorpus
from lossworks.models import Head, HeadedModel, LanguageModel, build_model
from lossworks.specs import LossSpec, TrainSpec
from lossworks.training.batches import IGNORE_INDEX
from lossworks.training.objective import build_objective
from lossworks.training.task import Evaluation, Task, as_sums


class LanguageTask(Task):
    """Next tokens of a text; the yardsticks are plain cross-entropy, perplexity and bits per byte.

    Args:
        spec: The run.
        corpus: Its text.

    Raises:
        UserError: The text is too short.
    """

    unit: ClassVar[str] = "tokens"

    def __init__(self, spec: TrainSpec, corpus: TokenizedCorpus) -> None:
        super().__init__(spec)
        self.spec, self.vocab_size = spec, corpus.vocab_size
        self.train, self.held_out = corpus.split(spec.data)
        self._token_bytes = torch.from_numpy(np.array(corpus.token_bytes))
        # Plain cross-entropy is measured beside any other loss, and isn't computed twice.
        plain = LossSpec(impl=spec.loss.impl)
        self._plain = None if spec.loss == plain else build_objective(plain)

    def build_model(self) -> LanguageModel:
        """Return the untrained model."""
        return build_model(self.spec.model, vocab_size=self.vocab_size, seed=self.spec.seed)

    def counts(self, targets: Tensor) -> tuple[float, float]:
        """Return how many tokens count, and how many bytes of text they stand for."""
        return count_tokens(targets, self._token_bytes)

    def train_metrics(self, loss: float, elements: float, units: float, further: float) -> dict[str, float]:
        """Return the loss, and where that is cross-entropy, bits per byte."""
        if self._plain is not None:
            return {"train/loss": loss / elements}
        return {
            "train/loss": loss / elements,
            "train/cross_entropy": loss / units,
            "train/bits_per_byte": bits_per_byte(loss, further),
        }

    def measure(self, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        """Return summed loss, its elements, nats, tokens and bytes."""
        loss = self.objective(hidden, head, targets)
        nats = loss if self._plain is None else self._plain(hidden, head, targets)
        tokens, text_bytes = self.counts(targets.cpu())
        return as_sums(loss, self.objective.count(targets), nats, tokens, text_bytes, like=hidden)

    def evaluation(self, sums: Tensor) -> Evaluation:
        """Return the loss a token, and the yardsticks."""
        loss, elements, nats, tokens, text_bytes = sums.tolist()
        mean = nats / tokens
        yardsticks = {
            "eval/cross_entropy": mean,
            "eval/bits_per_byte": bits_per_byte(nats, text_bytes),
            "eval/perplexity": math.exp(mean) if mean < 700 else math.inf,
        }
        return Evaluation(loss / elements, yardsticks)

    def flops_per_unit(self, model: HeadedModel) -> float | None:
        """Return the operations a token."""
        if not isinstance(model, LanguageModel):
            return None
        return model.flops_per_token(self.spec.data.sequence_length)


def count_tokens(targets: Tensor, token_bytes: Tensor) -> tuple[int, float]:
    """Return how many targets are valid, and how many bytes of text they stand for."""
    valid = targets[targets != IGNORE_INDEX]
    return valid.numel(), float(token_bytes[valid].sum())


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Return a summed loss in bits over the bytes of its text; NaN where there was no text."""
    return nats / (math.log(2) * text_bytes) if text_bytes else math.nan
