"""Learning from the mean responses of bags: bag loss, instance loss, and between; with private labels."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Kind, Paper, choice, number
from lossworks.errors import UserError
from lossworks.losses.interface import Loss
from lossworks.losses.rows import wide

_RHO_GRID = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)


def numbered(bags: Tensor) -> tuple[Tensor, int]:
    """Return bags renumbered from 0 without gaps, int64, shape (N,), and how many there are.

    Raises:
        UserError: They are no integers.
    """
    if bags.dtype != torch.int64:
        raise UserError(f"aggregate-interpolation: bags are {bags.dtype}; they must be torch.int64")
    names, numbers = bags.unique(return_inverse=True)
    return numbers, len(names)


def bag_means(values: Tensor, bags: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of its bag at every row, shape (N,).

    Args:
        values: Shape (N,), floating point.
        bags: Names of bags, int64, shape (N,).
        valid: Which rows are in their bag, bool, shape (N,); None for all. The mean of none is 0.
    """
    return _means(
        values, *numbered(bags), torch.ones_like(bags, dtype=torch.bool) if valid is None else valid
    )


def _means(values: Tensor, bags: Tensor, size: int, valid: Tensor) -> Tensor:
    """Return bag means at every row of ``size`` bags numbered from 0."""
    inside = valid.to(values.dtype)
    totals = values.new_zeros(size).index_add(0, bags, torch.where(inside > 0, values, 0))
    counts = values.new_zeros(size).index_add(0, bags, inside)
    return (totals / counts.clamp(min=1))[bags]


def _log_means(logs: Tensor, bags: Tensor, size: int, valid: Tensor) -> Tensor:
    """Return the logarithm of the mean of exp(logs) over its bag at every row, shape (N,); 0 of no row."""
    inside = logs.masked_fill(~valid, -torch.inf)
    largest = logs.new_full((size,), -torch.inf).scatter_reduce(0, bags, inside.detach(), "amax")
    largest = torch.where(largest.isinf(), 0, largest)
    counts = logs.new_zeros(size).index_add(0, bags, valid.to(logs.dtype))
    totals = logs.new_zeros(size).index_add(0, bags, (inside - largest[bags]).exp())
    # Chosen before the logarithm, whose derivative at 0 is infinite.
    logarithms = torch.where(counts > 0, totals, 1).log() - counts.clamp(min=1).log()
    return (largest + logarithms)[bags]


def release(
    responses: Tensor, bags: Tensor, *, clip: float, epsilon: float, generator: torch.Generator
) -> Tensor:
    """Return the mean responses of bags with ε-label differential privacy, at every row, shape (N,).

    Responses are clipped to [−C, C]; one of them moves its bag's mean by at most 2C/k, so Laplace noise of
    scale 2C/(kε) on each mean hides it, and bags that share no row compose in parallel. Whatever is trained
    on the result is private as well.

    Args:
        responses: Shape (N,), floating point.
        bags: Names of bags, int64, shape (N,).
        clip: C > 0, in the responses' unit.
        epsilon: ε > 0.
        generator: Of the noise, on the CPU. A seed that others know takes the privacy away.

    Raises:
        UserError: A number is not positive, or a response is NaN, which no noise would hide.
    """
    if not (clip > 0 and epsilon > 0):
        raise UserError(f"release: clip={clip} and epsilon={epsilon} must be positive")
    if bool(responses.isnan().any()):
        raise UserError("release: a response is NaN; leave such rows out or put a number there")
    bags, size = numbered(bags)
    clipped = responses.clamp(-clip, clip)
    means = _means(clipped, bags, size, torch.ones_like(bags, dtype=torch.bool))
    counts = torch.bincount(bags, minlength=size).clamp(min=1).to(means)
    # By the inverse of its distribution function, in float64: u is uniform in (−1/2, 1/2).
    u = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    noise = -u.sign() * torch.log1p((-2 * u.abs()).clamp(min=-1 + 1e-16))
    return means + (2 * clip / (counts * epsilon) * noise.to(means))[bags]


def shrinkage(rho: float, bag_size: int) -> float:
    """Return the factor 1/(1 + ρ(k−1)) by which the loss shrinks a linear model on random bags.

    Centred isotropic features and many more rows than features; dividing by it is a cheap correction.
    """
    return 1 / (1 + rho * (bag_size - 1))


def linear_solution(features: Tensor, responses: Tensor, bag_size: int, rho: float) -> Tensor:
    """Return the θ of least squared interpolated loss, shape (D,), in closed form.

    Args:
        features: X, shape (N, D); rows of a bag follow one another, N a multiple of k.
        responses: Shape (N,); only their bag means count.
        bag_size: k.
        rho: ρ in [0, 1].
    """
    x, n = features, len(features)
    bags = x.reshape(n // bag_size, bag_size, -1).mean(1)
    means = responses.reshape(-1, bag_size).mean(1)
    m = len(bags)
    gram = (1 - rho) * bags.t() @ bags / m + rho * x.t() @ x / n
    return torch.linalg.lstsq(gram, bags.t() @ means / m).solution


def best_bag_size(
    sizes: Sequence[int],
    *,
    rows: int,
    features: int,
    clip: float,
    epsilon: float | None,
    noise: float = 1.0,
    seed: int = 0,
    draws: int = 8,
) -> tuple[int, float, dict[int, float]]:
    """Return the bag size and ρ of least error of a linear model on released labels, by simulation.

    Gaussian features, a θ of length 1, and for each size the best ρ of a grid. The more privacy (the smaller
    ε), the larger the best bags; without noise of privacy the best size is 1.

    Args:
        sizes: k to choose from.
        rows: N; what a size doesn't divide is left out.
        features: D.
        clip: C of the release, in the responses' unit.
        epsilon: ε of the release, or None for exact means.
        noise: Standard deviation of the responses around the model.
        seed: Of the simulation.
        draws: Data sets it averages over.

    Returns:
        k, its ρ, and the least mean ‖θ̂ − θ‖² by size.
    """
    risks: dict[int, float] = {}
    chosen: dict[int, float] = {}
    for k in sizes:
        curve = torch.zeros(len(_RHO_GRID), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(draws):
            curve += _errors(k, rows - rows % k, features, clip, epsilon, noise, generator) / draws
        risks[k], chosen[k] = float(curve.min()), _RHO_GRID[int(curve.argmin())]
    best = min(risks, key=lambda k: risks[k])
    return best, chosen[best], risks


def _errors(
    k: int, n: int, d: int, clip: float, epsilon: float | None, noise: float, generator: torch.Generator
) -> Tensor:
    """Return ‖θ̂ − θ‖² of one data set for every ρ of the grid."""
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    theta = F.normalize(torch.randn(d, dtype=torch.float64, generator=generator), dim=0)
    y = x @ theta + noise * torch.randn(n, dtype=torch.float64, generator=generator)
    if epsilon is not None:
        y = release(y, torch.arange(n) // k, clip=clip, epsilon=epsilon, generator=generator)
    found = [linear_solution(x, y, k, rho) for rho in _RHO_GRID]
    return torch.stack([(estimate - theta).square().sum() for estimate in found])


class AggregateInterpolation(Loss):
    """Losses for bags of which only the mean response is known, between bag level and instance level.

    ρ = 0 compares the mean prediction of a bag with its mean response: unbiased, and with few bags unstable.
    ρ = 1 compares every prediction with it: stable, and shrunk towards the mean. For squared errors their
    difference is the variance of predictions within bags. A batch must hold whole bags, named by
    ``segments``.
    """

    slug = "aggregate-interpolation"
    kind: ClassVar[Kind] = "bag"
    formula = "(1-ρ) ℓ(ȳ_a, mean of f over bag a) + ρ ℓ(ȳ_a, f_i), each bag weighing its size"
    paper = Paper(
        "Learning from Aggregate Responses: Instance Level versus Bag Level Loss Functions",
        "Javanmard et al.",
        2024,
        "equation 3",
    )
    requires = ("segments",)

    rho: float = number(0.1, "ρ: 0 is the bag loss, 1 the instance loss", ge=0, le=1, search=(0, 1))
    response: str = choice(
        "real",
        "ℓ: squared error of real responses, or cross-entropy of probabilities, from logits",
        ("real", "binary"),
    )

    def forward(self, predictions: Tensor, responses: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            predictions: f, or logits of binary responses, floating point, shape (N,).
            responses: y, shape (N,), of which only the means of bags are used: they may be given instead.
            given: Fields of :class:`lossworks.losses.Context`; ``segments`` are the bags, shape (N,), and
                rows of weight 0 are in no bag.

        Returns:
            A scalar, or (N,) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: The shapes differ.
        """
        context = self.context(given)
        self.require_shape("responses", responses, predictions)
        bags = context.segments
        if bags is None or bags.shape != predictions.shape or predictions.dim() != 1:
            raise UserError(f"{self.slug}: segments must be shaped like predictions (N,)")
        valid = torch.ones_like(bags, dtype=torch.bool)
        if context.weight is not None:
            self.require_shape("weight", context.weight, predictions)
            valid = context.weight > 0
        f = wide(predictions)
        bags, size = numbered(bags)
        y = _means(responses.detach().to(f), bags, size, valid)
        losses = self._squared if self.response == "real" else self._binary
        of_bag, of_rows = losses(f, y, bags, size, valid)
        values = (1 - self.rho) * of_bag + self.rho * of_rows
        return self.reduce_elements(values, valid, context)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of rows, by which a training loop divides."""
        return torch.tensor(targets.numel(), device=targets.device)

    @staticmethod
    def _squared(f: Tensor, y: Tensor, bags: Tensor, size: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        return (_means(f, bags, size, valid) - y).square(), (f - y).square()

    @staticmethod
    def _binary(f: Tensor, y: Tensor, bags: Tensor, size: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of sigmoids and not the sigmoid of the mean: responses are what is averaged.

        In logarithms, since a probability that rounds to 0 or 1 would have no gradient.
        """
        ones, zeros = F.logsigmoid(f), F.logsigmoid(-f)
        of_bag = y * _log_means(ones, bags, size, valid) + (1 - y) * _log_means(zeros, bags, size, valid)
        return -of_bag, -(y * ones + (1 - y) * zeros)
