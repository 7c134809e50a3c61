"""The catalogue's row losses straight from the papers, for one row of float64 logits at a time.

Nothing here is shared with the implementation, and nothing is made stable: the rows of the tests are mild.
"""

import math
from collections.abc import Callable, Sequence

import torch

Formula = Callable[[Sequence[float], int, dict], float]


def softmax(z):
    total = sum(math.exp(value) for value in z)
    return [math.exp(value) / total for value in z]


def cross_entropy(z, y, options):
    alpha, weights = options["label_smoothing"], options["class_weight"] or [1.0] * len(z)
    surprise = [-math.log(p) for p in softmax(z)]
    smooth = sum(w * s for w, s in zip(weights, surprise, strict=True)) / len(z)
    return (1 - alpha) * weights[y] * surprise[y] + alpha * smooth


def log_z(z, y, options):
    log_total = math.log(sum(math.exp(value) for value in z))
    penalty = options["coefficient"] * log_total**2
    return penalty if options["alone"] else cross_entropy(z, y, options) + penalty


def comp_sum(z, y, options):
    tau, u = options["tau"], sum(math.exp(value - z[y]) for k, value in enumerate(z) if k != y)
    return math.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


def violations(z, y, margin):
    return [value - z[y] + (margin if k != y else 0.0) for k, value in enumerate(z)]


def worst_case(d, temperature):
    """Return max over p of p·d − λ KL(p ‖ 1/K), at its maximiser p ∝ exp(d/λ), and that KL."""
    p = softmax([value / temperature for value in d])
    divergence = sum(q * math.log(q * len(d)) for q in p if q > 0)
    gain = sum(q * value for q, value in zip(p, d, strict=True))
    return gain - temperature * divergence, divergence


def normalised(z, how):
    if how == "none":
        return z
    if how == "softplus-mean":
        z = [math.log1p(math.exp(value)) for value in z]
    unit = sum(abs(value) for value in z) / len(z)
    return [value / unit for value in z]


def ldr(z, y, options):
    d = violations(normalised(z, options["normalisation"]), y, options["margin"])
    return worst_case(d, options["temperature"])[0]


def aldr_kl(z, y, options):
    d = violations(normalised(z, options["normalisation"]), y, options["margin"])
    start, strength = options["temperature"], options["alpha"] * math.log(len(z))
    temperature = start
    for _ in range(options["steps"]):
        temperature = start * (1 - worst_case(d, temperature)[1] / strength)
    return worst_case(d, temperature)[0] - strength / (2 * start) * (temperature - start) ** 2


def spherical_z(z, y, options):
    mean = sum(z) / len(z)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in z) / len(z))
    a, b = options["a"], options["b"]
    return math.log(1 + math.exp(a * (b - (z[y] - mean) / deviation))) / a


def one_vs_rest(z, y, options, loss):
    """Return the mean over the classes that count of a loss of a class's probability and whether it is y."""
    classes = {"target": [y], "all": range(len(z)), "but-first": range(1, len(z))}[options["classes"]]
    p = softmax(z)
    return sum(loss(p[k], float(k == y)) for k in classes) / len(classes)


def dice_of(u, y, options):
    gamma, power = options["gamma"], 2 if options["square"] else 1
    return 1 - (2 * u * y + gamma) / (u**power + y**power + gamma)


def dice(z, y, options):
    return one_vs_rest(z, y, options, lambda p, own: dice_of(p, own, options))


def self_adjusting_dice(z, y, options):
    def loss(p, own):
        return dice_of((1 - p) ** options["alpha"] * p, own, options)

    return one_vs_rest(z, y, options, loss)


def tversky(z, y, options):
    def loss(p, own):
        weighted = options["alpha"] * p * (1 - own) + options["beta"] * (1 - p) * own
        return 1 - (p * own + options["gamma"]) / (p * own + weighted + options["gamma"])

    return one_vs_rest(z, y, options, loss)


FORMULAS: dict[str, Formula] = {
    "aldr-kl": aldr_kl,
    "comp-sum": comp_sum,
    "cross-entropy": cross_entropy,
    "dice": dice,
    "ldr": ldr,
    "log-z": log_z,
    "self-adjusting-dice": self_adjusting_dice,
    "spherical-z-loss": spherical_z,
    "tversky": tversky,
}


def of_rows(slug: str, logits: torch.Tensor, targets: torch.Tensor, options: dict) -> torch.Tensor:
    """Return the formula of every row, 0 where the target is negative; shapes (N, K), (N,) to (N,)."""
    values = [
        FORMULAS[slug](row, y, options) if y >= 0 else 0.0
        for row, y in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)
