"""The edit-invariant sequence loss: every n-gram of the target may stand anywhere in the output.

Shapes: B sequences, T output positions, T* target tokens, V classes.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number, numbers, switch
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.head import LogSumExp, linear_row_statistics
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem, of_sequences
from lossworks.losses.random_stream import RandomStream
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

_FLOOR = -20.0  # of a token's log-probability, so that one impossible token doesn't rule out an n-gram


def ngram_scores(costs: Tensor, n: int) -> Tensor:
    """Return log g: the log-probability of every target n-gram at every output position.

    Args:
        costs: Log-probability of target token i at position i', shape (B, T, T*).
        n: Length of the n-grams, 1 ≤ n ≤ min(T, T*).

    Returns:
        Σ_j costs[i'+j, i+j], shape (B, T − n + 1, T* − n + 1).
    """
    places, tokens = costs.shape[1] - n + 1, costs.shape[2] - n + 1
    return torch.stack([costs[:, j : j + places, j : j + tokens] for j in range(n)]).sum(0)


def edit_invariant(
    costs: Tensor,
    valid: Tensor,
    places: Tensor,
    n: int,
    *,
    temperature: float,
    noise: Tensor | None = None,
    normalise: bool = False,
) -> Tensor:
    """Return L_n, the mean over n-grams of −Σ_{i'} q log g, shape (B,); 0 without an n-gram.

    q is the (Gumbel) softmax of log g over positions; the gradient flows through it, too.

    Args:
        costs: As for :func:`ngram_scores`.
        valid: Which target tokens count, bool, (B, T*); an n-gram counts if all of its tokens do.
        places: Which output positions count, bool, (B, T).
        n: Length of the n-grams; longer ones than the sequences are none.
        temperature: τ of q.
        noise: Gumbel noise, shape (B, T, T*), of which a part is used, or None.
        normalise: Divide log g by n, as in the authors' code.
    """
    if n > min(costs.shape[1:]):
        return 0.0 * costs.sum((1, 2))  # of the graph, so that a backward pass finds its way
    scores = ngram_scores(costs, n) / (n if normalise else 1)
    grams = valid.unfold(1, n, 1).all(-1)  # (B, T*−n+1)
    spots = places.unfold(1, n, 1).all(-1)  # (B, T−n+1)
    drawn = scores if noise is None else scores + noise[:, : scores.shape[1], : scores.shape[2]]
    # A row without any position gets equal weights instead of NaN; it counts for nothing.
    blocked = ~spots[:, :, None] & spots.any(1)[:, None, None]
    q = (drawn / temperature).masked_fill(blocked, -torch.inf).softmax(1)
    grams = grams & spots.any(1, keepdim=True)
    losses = torch.where(grams, -(q * scores).sum(1), 0)
    return losses.sum(1) / grams.sum(1).clamp(min=1)


class EISL(Loss):
    """EISL: cross-entropy of target n-grams against the places where the output has them.

    Robust against targets whose words are shuffled, repeated or blanked. The output must be the model's own
    (non-autoregressive, or conditioned on what it generated), not teacher-forced. With one n-gram as long as
    both sequences it is the cross-entropy of the sequence. Repeated tokens may all claim one position, and
    only n ≥ 2 asks for an order.
    """

    slug = "eisl"
    kind: ClassVar[str] = "sequence"
    formula = "Σ_n w_n mean_i -Σ_i' q log g, g of n-gram i at position i', q = softmax((log g + Gumbel)/τ)"
    paper = Paper(
        "Don't Take It Literally: An Edit-Invariant Sequence Loss for Text Generation",
        "Liu et al.",
        2022,
        "equations 4 to 7",
    )
    without_logits = True
    products = 4.0
    invariances = ("shift",)
    flags = ("random", "own-outputs")
    example = "lossworks train jobs/specs/sentences.yaml loss={slug}"

    orders: tuple[float, ...] = numbers((1.0, 2.0), "n: lengths of the n-grams, of equal weight", ge=1, le=64)
    temperature: float = number(1.0, "τ of the softmax over positions", gt=0, search=(0.1, 10), log=True)
    noise: bool = switch(True, "Gumbel noise in training; never after eval()")
    cross_entropy: float = number(
        0.0,
        "share of the token-wise cross-entropy, which brings the noise of targets back",
        ge=0,
        le=1,
        search=(0, 1),
    )
    normalise: bool = switch(False, "divide an n-gram's log-probability by n, as in the authors' code")
    seed: int = integer(0, "of the noise; give each member and client its own", ge=0)

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.orders or any(n != int(n) for n in self.orders):
            raise UserError(f"{self.slug}: orders={self.orders} must be whole numbers, at least one")
        self.stream = RandomStream(self.seed)

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`."""
        return of_sequences(rows, generator)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of sequences with a token that counts."""
        return (targets != self.ignore_index).any(-1).sum()

    def of(self, outputs: Outputs, batch: Batch, **how: Any) -> Tensor:
        """See :meth:`Loss.of`; without the logits where there is a head."""
        head = outputs.head
        if head is None:
            return super().of(outputs, batch)
        given = {**how, **self.given(batch)}
        return self.linear(
            outputs.hidden, head.weight, batch["targets"], head.bias, softcap=head.softcap, **given
        )

    def forward(self, logits: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss of dense logits.

        Args:
            logits: Shape (B, T, V); half precision is read in float32.
            targets: Classes or ``ignore_index``, int64, shape (B, T*). Where T = T* output positions beside
                ignored targets don't count either.
            given: Fields of :class:`lossworks.losses.Context`.

        Returns:
            A scalar, or (B,) for ``reduction="none"``.

        Raises:
            UserError: The shapes don't fit.
        """
        self._check(logits, targets, logits.shape[-1])
        targets = self.counting(targets, self.context(given))
        kept = self._places(logits, targets)
        # Chosen first: where nothing counts, the logits may be anything.
        log_p = torch.where(kept[:, :, None], wide(logits), 0).log_softmax(-1)
        index = self._index(targets)[:, None, :].expand(-1, logits.shape[1], -1)
        return self._reduced(log_p.gather(2, index), targets, kept, given)

    def linear(
        self,
        e: Tensor,
        c: Tensor,
        targets: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        impl: str = "auto",
        **given: Tensor | None,
    ) -> Tensor:
        """Return the loss of logits E·Cᵀ + b without building them: (B, T, T*) numbers beside one pass.

        Args:
            e: E, shape (B, T, D).
            c: C, shape (V, D).
            targets: As for :meth:`forward`.
            bias: b, shape (V,), or None.
            softcap: Cap of the logits' magnitude, or None.
            impl: As for :func:`lossworks.linear_row_statistics`.
            given: Fields of :class:`lossworks.losses.Context`.
        """
        self._check(e, targets, len(c))
        targets = self.counting(targets, self.context(given))
        kept = self._places(e, targets)
        e = torch.where(kept[:, :, None], e, 0)
        # Any class will do: only the logsumexp is asked for.
        (lse,) = linear_row_statistics(
            *(e, c, torch.where(kept, 0, -100), bias),
            statistics=[LogSumExp()],
            softcap=softcap,
            impl=impl,  # type: ignore[arg-type]  # checked there
        )
        index = self._index(targets)
        # Half precision would round whole logits here, and the loss is a difference of them.
        with torch.autocast(e.device.type, enabled=False):
            z = torch.bmm(wide(e), F.embedding(index, wide(c)).transpose(1, 2))
        z = z if bias is None else z + wide(bias)[index][:, None, :]
        z = z if softcap is None else softcap * (z / softcap).tanh()
        return self._reduced(z - lse[:, :, None], targets, kept, given)

    def _places(self, rows: Tensor, targets: Tensor) -> Tensor:
        """Return which output positions count, bool, (B, T)."""
        valid = targets != self.ignore_index
        same = rows.shape[1] == targets.shape[1]
        return valid if same else valid.any(1, keepdim=True).expand(rows.shape[:2])

    def _index(self, targets: Tensor) -> Tensor:
        return torch.where(targets == self.ignore_index, 0, targets)

    def _check(self, rows: Tensor, targets: Tensor, classes: int) -> None:
        if rows.dim() != 3 or targets.dim() != 2 or len(rows) != len(targets):
            raise UserError(
                f"{self.slug}: rows {tuple(rows.shape)} and targets {tuple(targets.shape)} must be (B, T, …) "
                "and (B, T*)"
            )
        if self.cross_entropy and rows.shape[1] != targets.shape[1]:
            raise UserError(
                f"{self.slug}: cross_entropy={self.cross_entropy:g} needs as many outputs as targets, not "
                f"{rows.shape[1]} and {targets.shape[1]}"
            )
        if targets.dtype != torch.int64:
            raise UserError(f"{self.slug}: targets are {targets.dtype}; they must be torch.int64 classes")
        check_range(targets.reshape(-1), classes=classes, ignore_index=self.ignore_index)

    def _reduced(
        self, log_p: Tensor, targets: Tensor, places: Tensor, given: dict[str, Tensor | None]
    ) -> Tensor:
        """Reduce log-probabilities (B, T, T*) of all target tokens at all positions."""
        context = self.context(given)
        valid = targets != self.ignore_index
        costs, noise = log_p.clamp(min=_FLOOR), self._gumbel(log_p)
        options = {"temperature": self.temperature, "noise": noise, "normalise": self.normalise}
        values = torch.stack(
            [edit_invariant(costs, valid, places, int(n), **options) for n in self.orders]  # type: ignore[arg-type]
        ).mean(0)
        if self.cross_entropy:
            own = torch.where(valid, -log_p.diagonal(dim1=1, dim2=2), 0).sum(1) / valid.sum(1).clamp(min=1)
            values = (1 - self.cross_entropy) * values + self.cross_entropy * own
        return self.reduce_elements(values, valid.any(1), context)

    def _gumbel(self, like: Tensor) -> Tensor | None:
        if not (self.noise and self.training):
            return None
        # In float64, the same for every device; away from 0, whose logarithm is infinite.
        u = torch.from_numpy(self.stream.next().random(like.shape)).clamp(min=1e-12)
        return -(-u.log()).clamp(min=1e-12).log().to(like)
