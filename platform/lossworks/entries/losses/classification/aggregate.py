"""Learning from the mean responses of bags: bag loss, instance loss, and between; with private labels."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper, choice, number
from lossworks.errors import UserError
from lossworks.head.core.valid_rows import check_range
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem, of_classes
from lossworks.losses.rows import wide
from lossworks.models.interface import Outputs

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
    """Return the mean of its bag at every row, shape (N, ...).

    Args:
        values: Shape (N, ...), floating point.
        bags: Names of bags, int64, shape (N,).
        valid: Which rows are in their bag, bool, shape (N,); None for all. The mean of none is 0.
    """
    return _means(
        values, *numbered(bags), torch.ones_like(bags, dtype=torch.bool) if valid is None else valid
    )


def _means(values: Tensor, bags: Tensor, size: int, valid: Tensor) -> Tensor:
    """Return bag means at every row of ``size`` bags numbered from 0."""
    inside = torch.where(_beside(valid, values), values, 0)
    totals = values.new_zeros(size, *values.shape[1:]).index_add(0, bags, inside)
    return (totals / _beside(_counts(values, bags, size, valid).clamp(min=1), totals))[bags]


def _log_means(logs: Tensor, bags: Tensor, size: int, valid: Tensor) -> Tensor:
    """Return the logarithm of its bag's mean of exp(logs) at every row, (N, K) to (N, K); 0 of none."""
    inside = logs.masked_fill(~valid[:, None], -torch.inf)
    start = logs.new_full((size, logs.shape[1]), -torch.inf)
    largest = start.scatter_reduce(0, bags[:, None].expand_as(logs), inside.detach(), "amax")
    largest = torch.where(largest.isinf(), 0, largest)
    totals = torch.zeros_like(start).index_add(0, bags, (inside - largest[bags]).exp())
    counts = _counts(logs, bags, size, valid)[:, None]
    # Chosen before the logarithm, whose derivative at 0 is infinite.
    logarithms = torch.where(counts > 0, totals, 1).log() - counts.clamp(min=1).log()
    return (largest + logarithms)[bags]


def _counts(like: Tensor, bags: Tensor, size: int, valid: Tensor) -> Tensor:
    """Return how many rows a bag has, shape (size,), in the dtype of ``like``."""
    return like.new_zeros(size).index_add(0, bags, valid.to(like))


def _beside(rows: Tensor, values: Tensor) -> Tensor:
    """Return numbers of rows (N,) in a shape that broadcasts with values (N, ...)."""
    return rows.reshape(-1, *[1] * (values.dim() - 1))


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
    found: Tensor = torch.linalg.lstsq(gram, bags.t() @ means / m).solution
    return found


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
    ``segments``. Of classes the mean response is each class's share of the bag, and the mean prediction that
    of the softmax.
    """

    slug = "aggregate-interpolation"
    kind: ClassVar[str] = "bag"
    formula = "(1-ρ) ℓ(ȳ_a, mean of f over bag a) + ρ ℓ(ȳ_a, f_i), each bag weighing its size"
    paper = Paper(
        "Learning from Aggregate Responses: Instance Level versus Bag Level Loss Functions",
        "Javanmard et al.",
        2024,
        "equation 3",
    )
    requires = ("segments",)
    example = "lossworks train jobs/specs/digits.yaml loss={slug} data.bag_size=8"

    rho: float = number(0.1, "ρ: 0 is the bag loss, 1 the instance loss", ge=0, le=1, search=(0, 1))
    response: str = choice(
        "auto",
        "ℓ: squared error of real responses; cross-entropy of probabilities of one class (binary), from a "
        "logit a row, or of K classes (class), from K logits; auto: class where responses are integers, else "
        "real",
        ("auto", "real", "binary", "class"),
    )

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`; bags of two rows."""
        bags = torch.arange(rows) // 2
        if self.response == "class":
            return of_classes(rows, generator).given(segments=bags)
        predictions, responses = torch.randn(2, rows, dtype=torch.float64, generator=generator)
        if self.response == "binary":
            responses = responses.sigmoid()
        return Problem(predictions, responses, {"segments": bags})

    def forward(self, predictions: Tensor, responses: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            predictions: f, or logits of binary responses, floating point, shape (N,); or logits of classes,
                shape (N, K). Half precision is read in float32.
            responses: y, shape (N,), of which only the means of bags are used: they may be given instead.
                Classes are int64 in [0, K). Rows where they are NaN or ``ignore_index`` are in no bag.
            given: Fields of :class:`lossworks.losses.Context`; ``segments`` are the bags, shape (N,), and
                rows of weight 0 are in no bag.

        Returns:
            A scalar, or (N,) for ``reduction="none"``; float32 at least.

        Raises:
            UserError: The shapes differ, or a class is out of range.
        """
        context = self.context(given)
        response = self._response(responses)
        self._check(predictions, responses, response)
        named = context.segments
        if named is None or named.shape != responses.shape:
            raise UserError(f"{self.slug}: segments must be shaped like responses (N,)")
        valid = self._known(self.counting(responses, context))
        bags, size = numbered(named)
        # Chosen first: where nothing is known, predictions and responses may be anything.
        f = torch.where(_beside(valid, predictions), wide(predictions), 0)
        y = torch.where(valid, responses.detach(), 0)
        losses = self._squared if response == "real" else self._cross_entropy
        of_bag, of_rows = losses(f, y, bags, size, valid)
        values = (1 - self.rho) * of_bag + self.rho * of_rows
        return self.reduce_elements(values, valid, context)

    def count(self, targets: Tensor) -> Tensor:
        """Return how many responses are known, by which a training loop divides."""
        return self._known(targets).sum()

    def _known(self, responses: Tensor) -> Tensor:
        return ~responses.isnan() if responses.is_floating_point() else responses != self.ignore_index

    def prediction(self, outputs: Outputs) -> Tensor:
        """Return the logits of classes, (N, K), or the one output a row, (N,); of two classes z_1 - z_0."""
        logits = outputs.logits
        if self.response == "binary" and logits.shape[-1] == 2:
            return logits[..., 1] - logits[..., 0]
        return logits[..., 0] if logits.shape[-1] == 1 else logits

    def _response(self, responses: Tensor) -> str:
        """Return what the responses are taken for."""
        if self.response != "auto":
            return self.response
        return "real" if responses.is_floating_point() else "class"

    def _check(self, predictions: Tensor, responses: Tensor, response: str) -> None:
        classes = response == "class"
        if predictions.dim() != 1 + classes:
            expected = "(N, K)" if classes else "(N,)"
            raise UserError(
                f"{self.slug}: predictions {tuple(predictions.shape)} must be {expected} "
                f"with response={response}"
            )
        self.require_shape("responses", responses, predictions[..., 0] if classes else predictions)
        if classes:
            if responses.dtype != torch.int64:
                raise UserError(f"{self.slug}: responses are {responses.dtype}; classes must be torch.int64")
            check_range(responses, classes=predictions.shape[1], ignore_index=self.ignore_index)

    @staticmethod
    def _squared(f: Tensor, y: Tensor, bags: Tensor, size: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        mean = _means(y.to(f), bags, size, valid)
        return (_means(f, bags, size, valid) - mean).square(), (f - mean).square()

    @staticmethod
    def _cross_entropy(f: Tensor, y: Tensor, bags: Tensor, size: int, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of probabilities and not those of the mean: responses are what is averaged.

        In logarithms, since a probability that rounds to 0 or 1 would have no gradient.
        """
        if f.dim() == 1:
            log_p, of_classes = F.logsigmoid(torch.stack((-f, f), 1)), torch.stack((1 - y, y), 1)
        else:
            log_p, of_classes = f.log_softmax(1), F.one_hot(y, f.shape[1])
        shares = _means(of_classes.to(f), bags, size, valid)
        return -(shares * _log_means(log_p, bags, size, valid)).sum(1), -(shares * log_p).sum(1)
