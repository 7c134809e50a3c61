"""What filters do to gradients: the published one, written densely, and measures of the error it makes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

from lossworks import linear_cross_entropy

# Rows and classes of a tile of the published kernel.
TILE = 128
# Rows of which our CPU path keeps the columns that any of them wants.
_COLUMN_ROWS = 256


class FilteredGradients(NamedTuple):
    """Of the summed loss.

    Attributes:
        loss: The sum over rows, exact.
        e: ∂E, shape (N, D).
        c: ∂C, shape (V, D).
        left_out: Probability that was left out of each row, shape (N,).
        kept: Share of tiles, or of columns of 256 rows, that was computed; 1 without a filter.
    """

    loss: Tensor
    e: Tensor
    c: Tensor
    left_out: Tensor
    kept: float


def exact_gradients(e: Tensor, c: Tensor, targets: Tensor) -> FilteredGradients:
    """Return the gradients of plain torch in float64, for E (N, D), C (V, D) and targets (N,)."""
    e, c = (x.detach().double().requires_grad_() for x in (e, c))
    loss = cross_entropy(e @ c.t(), targets, reduction="sum")
    of_e, of_c = torch.autograd.grad(loss, (e, c))
    return FilteredGradients(loss.detach(), of_e, of_c, e.new_zeros(len(e)), 1.0)


def library_gradients(
    e: Tensor, c: Tensor, targets: Tensor, eps: float, *, repair: bool
) -> FilteredGradients:
    """Return the gradients of the filter of :func:`lossworks.linear_cross_entropy`, in the inputs' dtype.

    The shapes are those of :func:`exact_gradients`.
    """
    e, c = (x.detach().requires_grad_() for x in (e, c))
    loss, mass = linear_cross_entropy(
        e,
        c,
        targets,
        reduction="sum",
        filter_eps=eps,
        filter_repair=repair,
        impl="cpu",
        return_mass=True,
    )
    of_e, of_c = torch.autograd.grad(loss, (e, c))
    return FilteredGradients(
        loss.detach(), of_e, of_c, mass, kept_columns(e.detach(), c.detach(), targets, eps)
    )


def rounded_gradients(e: Tensor, c: Tensor, targets: Tensor) -> FilteredGradients:
    """Return what rounding alone makes of the gradients: inputs and results in bfloat16, without a filter.

    The shapes are those of :func:`exact_gradients`.
    """
    e, c = (x.detach().bfloat16().requires_grad_() for x in (e, c))
    loss = linear_cross_entropy(e, c, targets, reduction="sum", impl="cpu")
    of_e, of_c = torch.autograd.grad(loss, (e, c))
    return FilteredGradients(loss.detach(), of_e, of_c, e.new_zeros(len(e)), 1.0)  # type: ignore[union-attr]


def kept_columns(e: Tensor, c: Tensor, targets: Tensor, eps: float) -> float:
    """Return the share of columns of 256 rows with a probability of at least eps, or a target.

    The shapes are those of :func:`exact_gradients`.
    """
    shares = []
    for rows in torch.arange(len(e)).split(_COLUMN_ROWS):
        large = (e[rows] @ c.t()).softmax(1).amax(0) >= eps
        large[targets[rows]] = True
        shares.append(large.double().mean().item() * len(rows))
    return sum(shares) / len(e)


def tile_gradients(
    e: Tensor, c: Tensor, targets: Tensor, eps: float, *, repair: bool, size: int = TILE
) -> FilteredGradients:
    """Return the gradients of the published filter, in the inputs' dtype.

    Classes are sorted by their mean logit, and a tile of ``size`` rows × ``size`` classes is dropped where
    every abs(p_ik − [k = y_i]) is below eps (Wijmans et al., *Cut Your Losses in Large-Vocabulary Language
    Models*, ICLR 2025, section 4.3). Nothing is rounded to bfloat16 here, so the filter is seen alone.

    Args:
        e: Shape (N, D).
        c: Shape (V, D).
        targets: Shape (N,), in [0, V).
        eps: The threshold.
        repair: Put the rank-one matrix of :mod:`lossworks.head.core.filtering` in place of what is dropped.
        size: Rows and classes of a tile.
    """
    order = (c @ e.mean(0)).argsort()
    c = c[order]
    own = torch.arange(len(e)), order.argsort()[targets]
    p = (e @ c.t()).softmax(1)
    loss = -p[own].log().sum()
    p[own] -= 1
    tiles = kept_tiles(p, eps, size)
    rest = p.masked_fill(_spread(tiles, size, p.shape), 0)
    p -= rest
    rest[own] = 0
    m, q = rest.sum(1), rest.sum(0)
    of_e, of_c = p @ c, p.t() @ e
    if repair and m.sum() > 0:
        of_e.addr_(m, q @ c / q.sum())
        of_c.addr_(q, m @ e / m.sum())
    return FilteredGradients(loss, of_e, of_c[order.argsort()], m, tiles.double().mean().item())


def kept_tiles(g: Tensor, eps: float, size: int) -> Tensor:
    """Return which tiles of ∂L/∂z (N, V) hold a number of at least eps, (⌈N/size⌉, ⌈V/size⌉)."""
    rows, classes = (-(-length // size) for length in g.shape)
    g = torch.nn.functional.pad(g, (0, classes * size - g.shape[1], 0, rows * size - g.shape[0]))
    return g.abs().view(rows, size, classes, size).amax(3).amax(1) >= eps


def _spread(tiles: Tensor, size: int, shape: torch.Size) -> Tensor:
    wide = tiles.repeat_interleave(size, 0).repeat_interleave(size, 1)
    return wide[: shape[0], : shape[1]]


class TileFiltered(torch.autograd.Function):
    """The summed loss whose gradient is :func:`tile_gradients`."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, c: Tensor, targets: Tensor, eps: float, repair: bool) -> Tensor:
        """Return the summed loss, a scalar, and keep the gradients of E (N, D) and C (V, D)."""
        made = tile_gradients(e, c, targets, eps, repair=repair)
        ctx.save_for_backward(made.e, made.c)
        return made.loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the kept gradients times the upstream gradient, a scalar."""
        of_e, of_c = ctx.saved_tensors
        return upstream * of_e, upstream * of_c, None, None, None


def errors(made: FilteredGradients, exact: FilteredGradients, rare: Tensor) -> list[tuple[str, float, str]]:
    """Return metric, value and unit of each measure.

    Args:
        made: Gradients with an error.
        exact: In float64.
        rare: Which classes are rare, shape (V,).
    """
    difference = made.c.double() - exact.c
    of_row = difference.norm(dim=1) / exact.c.norm(dim=1)
    return [
        ("error dE", float((made.e.double() - exact.e).norm() / exact.e.norm()), "relative"),
        ("error dC", float(difference.norm() / exact.c.norm()), "relative"),
        ("zero rows of dC", 100 * float((made.c == 0).all(1).double().mean()), "%"),
        ("error of a row of dC", float(of_row.median()), "median"),
        ("error of a rare row", float(of_row[rare].median()), "median"),
        ("cosine of rows of dC", float(cosine_similarity(made.c.double(), exact.c, dim=1).mean()), "mean"),
        ("left out", 100 * float(made.left_out.double().mean()), "% of p"),
        ("kept", 100 * made.kept, "%"),
    ]
