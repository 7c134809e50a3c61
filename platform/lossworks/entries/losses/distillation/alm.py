"""Distillation from a teacher that reads other tokens: the probabilities of chunks of text that both share.

Shapes: B rows, L tokens, M chunks a row, V classes.
"""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, number, switch
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head import LogSumExp
from lossworks.head.core.arguments import Implementation
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.losses.problems import CLASSES, Problem
from lossworks.losses.rows import rows_of, token_log_probabilities
from lossworks.models.interface import Outputs

_LENGTH = 3


def chunk_loss(own: Tensor, teacher: Tensor, temperature: float, epsilon: float) -> Tensor:
    """Return the cross-entropy of whether a chunk is drawn, −P log Q − (1 − P) log(1 − Q); of own's shape.

    Q = exp(b/τ − ε) and P = exp(a/τ − ε) for the log-probabilities b of the model and a of the teacher.

    Args:
        own: b ≤ 0.
        teacher: a ≤ 0, without a gradient.
        temperature: τ.
        epsilon: ε, which keeps Q below 1.
    """
    a, b = (value.clamp(max=0) / temperature - epsilon for value in (teacher.detach(), own))
    return -a.exp() * b - -torch.expm1(a) * log_one_minus(b)


def log_one_minus(x: Tensor) -> Tensor:
    """Return log(1 − eˣ) for x < 0, exact near 0 and far from it."""
    near = x > -math.log(2)
    # Each branch gets numbers that it can take, since a gradient of 0·∞ would be NaN.
    close, far = torch.where(near, x, -1.0), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(close)), torch.log1p(-far.exp()))


def chunk_sums(values: Tensor, chunks: Tensor, count: int) -> Tensor:
    """Return the sums of values (B, L) over chunks, (B, M); places without a chunk (−1) go nowhere."""
    there = chunks >= 0
    empty = values.new_zeros(len(values), count)
    return empty.scatter_add(1, chunks.clamp(min=0), torch.where(there, values, 0))


def word_end_log_probabilities(
    outputs: Outputs, chunks: Tensor, words: Tensor, count: int, impl: Implementation
) -> Tensor:
    """Return the log-probability that a word ends behind a chunk, (B, M).

    It is that of all classes before which a word ends, at the place behind the chunk's last token; 0 behind
    the last chunk of a row, of which nothing is known.

    Args:
        outputs: Features (B, L, D) with a head, or logits (B, L, V).
        chunks: Of each target, (B, L), −1 for none.
        words: Classes that begin with white space or end a text, bool (V,).
        count: M.
        impl: As for :func:`lossworks.linear_cross_entropy`.
    """
    following = F.pad(chunks[:, 1:], (0, 1), value=-1)
    ends = (chunks >= 0) & (following > chunks)  # the last token of a chunk that another one follows
    row, place = ends.nonzero(as_tuple=True)
    behind = rows_of(outputs.at((row, place + 1)), torch.zeros_like(row), impl=impl)
    within, everything = behind(LogSumExp(classes=words), LogSumExp())
    found = within.new_zeros(len(chunks), count)
    return found.index_put((row, chunks[row, place]), (within - everything).clamp(max=0))


def merged_chunks(chunks: Tensor, word_ends: Tensor, share: float) -> Tensor:
    """Return for each chunk the number of the one that it becomes part of, (B, M).

    A chunk is merged with the next while the teacher gives a word's end behind it at most the probability
    ``share``.

    Args:
        chunks: Of each token, (B, L), −1 for none.
        word_ends: Log-probabilities as of :func:`word_end_log_probabilities`, (B, M).
        share: γ in [0, 1).
    """
    last = chunks.amax(1, keepdim=True)
    every = torch.arange(word_ends.shape[1], device=chunks.device)
    open_ended = (word_ends.exp() <= share) & (every < last)
    ends = (~open_ended).long()
    found: Tensor = ends.cumsum(1) - ends
    return found


class ALM(Loss):
    """ALM: the chunks of text that two tokenizers share become as likely as a teacher says.

    A chunk's log-probability is the sum over its tokens, by either model in its own tokens. Sums are divided
    by the number of chunks that the tokenizers share, before any are merged. The hidden-state term and the
    weighting of terms by gradients of the paper are not part of it.

    Use it to move a model to another tokenizer, or to teach it from one whose tokens differ; where both
    have the same tokenizer, ``distillation`` sees whole distributions and learns more from each token. At
    τ = 1 long chunks have next to no gradient; keep τ large.
    """

    slug = "alm"
    kind: ClassVar[str] = "cross-tokenizer"
    formula = "-P log Q - (1-P) log(1-Q), Q = exp(Σ log q / τ) of a chunk, P the teacher's"
    paper = Paper(
        "Cross-Tokenizer Distillation via Approximate Likelihood Matching",
        "Minixhofer, Vulić, Ponti",
        2025,
        "equation 5",
    )
    requires = ("chunks", "teacher_log_p", "teacher_word_ends", "word_classes")
    flags = ("other-tokens",)
    without_logits = True
    products = 4.0
    invariances = ("shift",)
    example: ClassVar[str] = "lossworks train jobs/specs/other-tokens.yaml loss={slug} roles.teacher=RUN"

    temperature: float = number(100.0, "τ: chunks are compared by P^(1/τ)", gt=0, search=(1, 1000), log=True)
    epsilon: float = number(1e-6, "ε: taken off log-probabilities after the temperature", gt=0, le=0.1)
    merge: float = number(
        0.1,
        "γ: a chunk is merged with the next where the teacher says that a word ends there with at most this "
        "probability; 0 merges none",
        ge=0,
        lt=1,
        search=(0.0, 0.3),
    )
    debias: bool = switch(
        False, "compare the probabilities of chunks that a word's end follows, which tokenizers can't bias"
    )

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`: logits (rows, 3, 7), and two chunks a row."""
        logits = torch.randn(rows, _LENGTH, CLASSES, dtype=torch.float64, generator=generator)
        found = Problem(logits, torch.randint(0, CLASSES, (rows, _LENGTH), generator=generator))
        chunks = torch.tensor([0, 0, 1]).expand(rows, -1)
        log_p = -3 * torch.rand(rows, _LENGTH, dtype=torch.float64, generator=generator) - 0.1
        words = torch.arange(CLASSES) < 2
        return found.given(
            chunks=chunks,
            teacher_log_p=log_p,
            teacher_word_ends=log_p.flip(0) / 4,
            word_classes=words.expand(rows, -1),
        )

    def valid_rows(self, targets: Tensor) -> Tensor:
        """Return which rows have a token that counts, bool (B,)."""
        return (targets != self.ignore_index).any(-1)

    def elements(self, batch: Batch) -> float:
        """Return how many chunks count."""
        return float(self._count(batch["targets"], batch["chunks"]).sum())

    def _count(self, targets: Tensor, chunks: Tensor) -> Tensor:
        """Return how many chunks of each row count, (B,)."""
        valid = (targets != self.ignore_index) & (chunks >= 0)
        return (torch.where(valid, chunks, -1).amax(-1) + 1) * valid.any(-1)

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; without the logits where there is a head."""
        context = self.context({**self.given(batch)})
        targets = self.counting(batch["targets"], context)
        impl = how.get("impl", "auto")
        self._check(outputs, targets, batch["chunks"])
        with torch.autocast(outputs.hidden.device.type, enabled=False):
            values = self._values(outputs, targets, batch, impl)
        chunks = self._count(targets, batch["chunks"])
        weight = self.weights(self.valid_rows(targets), context, values)
        rows = torch.where(weight != 0, values.sum(1), 0) * weight
        return self.reduce(rows, chunks * weight)

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: (B, L, V), floating point; half precision is read in float32.
            targets: Classes or ``ignore_index``, int64, (B, L).
            given: Fields of :class:`lossworks.losses.Context`: ``chunks`` (B, L), ``teacher_log_p`` and
                ``teacher_word_ends`` (B, M) by chunk, ``word_classes`` (B, V), the same for all rows.

        Returns:
            A scalar, or (B,) for ``reduction="none"``: sums over the chunks of a row.

        Raises:
            UserError: The shapes don't fit.
        """
        self.context(given)
        batch = {name: value for name, value in given.items() if value is not None}
        return self.of(Outputs(logits, None, dense=logits), {**batch, "targets": targets})

    def _values(self, outputs: Outputs, targets: Tensor, batch: Batch, impl: Implementation) -> Tensor:
        """Return the losses of chunks, (B, M); 0 where there is none."""
        valid = targets != self.ignore_index
        chunks = torch.where(valid, batch["chunks"], -1)
        theirs, word_ends = (batch[name] for name in ("teacher_log_p", "teacher_word_ends"))
        count = theirs.shape[1]
        log_p = token_log_probabilities(outputs, targets, ignore_index=self.ignore_index, impl=impl)
        own = chunk_sums(log_p, chunks, count)
        theirs, word_ends = theirs.to(own), word_ends.to(own)
        if self.debias:
            words = batch["word_classes"][0]
            own = own + word_end_log_probabilities(outputs, chunks, words, count, impl)
            theirs = theirs + word_ends
        there = torch.arange(count, device=own.device) < self._count(targets, chunks)[:, None]
        if self.merge:
            into = merged_chunks(chunks, word_ends, self.merge)
            own, theirs, found = (
                torch.zeros_like(own).scatter_add(1, into, torch.where(there, value, 0))
                for value in (own, theirs, torch.ones_like(own))
            )
            there = found > 0
        # What stands where there is no chunk may be anything.
        own, theirs = torch.where(there, own, -1.0), torch.where(there, theirs, -1.0)
        return torch.where(there, chunk_loss(own, theirs, self.temperature, self.epsilon), 0)

    def _check(self, outputs: Outputs, targets: Tensor, chunks: Tensor) -> None:
        if targets.dim() != 2 or outputs.hidden.shape[:2] != targets.shape or chunks.shape != targets.shape:
            raise UserError(
                f"{self.slug}: rows {tuple(outputs.hidden.shape)}, targets {tuple(targets.shape)} and chunks "
                f"{tuple(chunks.shape)} must be (B, L, …), (B, L) and (B, L)"
            )
        head = outputs.head
        classes = outputs.logits.shape[-1] if head is None else len(head.weight)
        check_range(targets.reshape(-1), classes=classes, ignore_index=self.ignore_index)
