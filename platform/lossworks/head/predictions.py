"""The most likely classes of each row, and log-probabilities of some, without keeping logits."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.adapters.torch_private import without_values
from lossworks.errors import UserError
from lossworks.head.core.arguments import (
    Implementation,
    check_integer,
    check_number,
    operands,
    require_tensors,
)
from lossworks.head.core.low_rank import LowRankClassifier, frozen_of, taken_apart
from lossworks.head.core.problem import LinearProblem
from lossworks.head.core.vocab_parallel import VocabParallel
from lossworks.head.cpu.tile_sizes import choose_tile_sizes
from lossworks.head.cpu.tiles import Logits, slices, view
from lossworks.head.row_statistics import linear_row_statistics
from lossworks.head.statistics import Gathered, LogSumExp


class TopK(NamedTuple):
    """The most likely classes of each row, most likely first.

    Attributes:
        log_probabilities: Shape (..., K), float32 at least.
        classes: Shape (..., K), int64.
    """

    log_probabilities: Tensor
    classes: Tensor


@torch.no_grad()
def linear_top_k(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    k: int,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    buffer_share: float = 0.05,
) -> TopK:
    """Return the K most likely classes and their log-probabilities, in one pass over C; no gradient.

    Args:
        e: Embeddings E, shape (..., D).
        c: Classifier C, shape (V, D), or a :class:`LowRankClassifier`.
        k: K, in [1, V]. Which of equally likely classes come first is not defined.
        bias: Shape (V,), or None.
        softcap: Cap of the logits' magnitude, or None.
        temperature: τ > 0, by which logits are divided.
        buffer_share: Largest buffer as a share of the logits.

    Raises:
        UserError: K or a shape does not fit.

    Example:
        >>> top = linear_top_k(torch.ones(1, 1), torch.tensor([[1.0], [3.0], [2.0]]), k=2)
        >>> top.classes.tolist()
        [[1, 2]]
    """
    e, c, frozen = taken_apart(e, c)
    require_tensors(e=e, c=c, bias=bias)
    check_integer("k", k)
    check_number("temperature", temperature)
    head = operands(e, c, bias, None, frozen)
    if not 1 <= k <= len(head.c):
        raise UserError(f"k={k} must be in [1, {len(head.c)}], the number of classes")
    if not temperature > 0:
        raise UserError(f"temperature={temperature} must be positive")
    call = _linear_top_k if without_values(e, c) else _top_k
    values, scale = frozen or (None, None)
    plain = (k, softcap, float(temperature), buffer_share, head.dtype)
    found = call(head.e, head.c, head.bias, values, scale, *plain)
    shape = (*e.shape[:-1], k)
    return TopK(found[0].reshape(shape), found[1].reshape(shape))


def _top_k(
    e: Tensor,
    c: Tensor,
    bias: Tensor | None,
    frozen: Tensor | None,
    frozen_scale: Tensor | None,
    k: int,
    softcap: float | None,
    temperature: float,
    share: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and classes, both (N, K)."""
    nowhere = torch.full((len(e),), -1, device=e.device)
    with torch.autocast(e.device.type, enabled=False):
        fixed = frozen_of(frozen, frozen_scale)
        logits = Logits(LinearProblem(e, c, nowhere, bias, softcap, frozen=fixed), dtype)
        values, classes, lse = _walk(logits, k, temperature, share)
        return values - lse[:, None], classes


_linear_top_k = torch.library.custom_op("lossworks::linear_top_k", _top_k, mutates_args=())


@_linear_top_k.register_fake
def _(e: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k, wide = rest[4], torch.promote_types(e.dtype, torch.float32)
    return e.new_empty(e.shape[0], k, dtype=wide), e.new_empty(e.shape[0], k, dtype=torch.int64)


def _walk(logits: Logits, k: int, temperature: float, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the largest z/τ, their classes, both (N, K), and log Σ exp(z/τ), (N,)."""
    size = logits.wide.itemsize
    plan = choose_tile_sizes(len(logits), logits.classes, size, share, keep=False, filtered=False)
    buffer = logits.buffer(plan.rows, plan.classes)
    blocks = slices(logits.classes, plan.classes)
    chunks = [_best(logits, rows, blocks, buffer, k, temperature) for rows in slices(len(logits), plan.rows)]
    values, classes, lse = (torch.cat(column) for column in zip(*chunks, strict=True))
    return values, classes, lse


def _best(
    logits: Logits, rows: slice, blocks: list[slice], buffer: Tensor, k: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`_walk` does, of a chunk of rows."""
    lse = buffer.new_full((rows.stop - rows.start,), float("-inf"))
    values = buffer.new_empty(len(lse), 0)
    found = torch.empty(len(lse), 0, dtype=torch.int64, device=buffer.device)
    for block in blocks:
        z = logits.tile(block, rows, view(buffer, block, rows)).div_(temperature)
        lse = torch.logaddexp(lse, z.logsumexp(0))
        best, place = z.topk(min(k, len(z)), dim=0)
        values = torch.cat([values, best.t()], dim=1)
        found = torch.cat([found, place.t() + block.start], dim=1)
        values, keep = values.topk(min(k, values.shape[1]), dim=1)
        found = found.gather(1, keep)
    return values, found, lse


def linear_log_probabilities(
    e: Tensor,
    c: Tensor | LowRankClassifier,
    classes: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    impl: Implementation = "auto",
    vocab_parallel: VocabParallel | dist.ProcessGroup | None = None,
    buffer_share: float = 0.05,
    batch_invariant: bool = False,
) -> Tensor:
    """Return log p_ik of a list of classes of each row, differentiable, in one pass over C.

    For sampled tokens (policy ratios, importance weights, contrastive candidates) and for evaluation.

    Args:
        e: Embeddings E, shape (..., D).
        c: Classifier C, shape (V, D), or a :class:`LowRankClassifier`.
        classes: int64 in [0, V) or ``ignore_index``, shape (..., K).
        bias: Shape (V,), or None.
        ignore_index: Where there is no class, as in candidates of unequal number: the result is 0 there and
            has no gradient. A row that has none costs nothing.
        softcap: Cap of the logits' magnitude, or None.
        temperature: τ > 0, by which logits are divided; a number or a tensor of shape (N,), differentiable.
        impl: As for :func:`lossworks.linear_cross_entropy`.
        vocab_parallel: As there.
        buffer_share: Largest buffer as a share of the logits.
        batch_invariant: As for :func:`lossworks.linear_cross_entropy`.

    Returns:
        log p, shape (..., K), float32 at least.

    Raises:
        UserError: A shape does not fit, or a class is out of range.
    """
    require_tensors(e=e, classes=classes)
    if classes.shape[:-1] != e.shape[:-1] or classes.dtype != torch.int64:
        raise UserError(
            f"classes {classes.dtype} {tuple(classes.shape)} must be torch.int64 {(*e.shape[:-1], 'K')}"
        )
    there = classes != ignore_index
    z, lse = linear_row_statistics(
        *(e, c, torch.where(there.any(-1), 0, -100), bias),
        statistics=[Gathered(torch.where(there, classes, 0)), LogSumExp(temperature)],
        softcap=softcap,
        impl=impl,
        vocab_parallel=vocab_parallel,
        buffer_share=buffer_share,
        batch_invariant=batch_invariant,
    )
    tau = temperature.reshape(-1)[:, None] if isinstance(temperature, Tensor) else temperature
    return torch.where(there, ((z - lse[..., None]).flatten(0, -2) / tau).reshape(z.shape), 0)
