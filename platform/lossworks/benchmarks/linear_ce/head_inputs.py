"""Inputs for ``lossworks bench linear-ce``: a head at the start of training and a trained one."""

import math

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How the mass that the target leaves is shared: four rivals, and the rest to the unigram distribution.
_RIVALS = (0.5, 0.25, 0.1, 0.05)
_REST = 1.0 - sum(_RIVALS)
_NOISE = 0.5  # std of all logits around the unigram distribution, nats
_CONFIDENCE = (2.0, 5.0)  # mean and std of the target's log-odds, nats


def make_inputs(
    n: int, v: int, d: int, distribution: str, dtype: str, device: str, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return E (N, D), C (V, D), both leaves that require gradients, and y (N,).

    ``random`` has Gaussian E and C with logits of standard deviation 1 and uniform targets, so that the loss
    is about ln V + ½. ``peaked`` is built as a trained head looks; see ``_peaked``.
    """
    generator = torch.Generator().manual_seed(seed)
    make = _peaked if distribution == "peaked" else _random
    e, c, y = make(n, v, d, generator)
    e, c = (x.to(device, DTYPES[dtype]).requires_grad_() for x in (e, c))
    return e, c, y.to(device)


def _random(n: int, v: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    e = torch.randn(n, d, generator=generator)
    c = torch.randn(v, d, generator=generator).div_(math.sqrt(d))
    return e, c, torch.randint(v, (n,), generator=generator)


def _peaked(n: int, v: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return inputs whose softmax has a spike at the target, a few rivals and a thin unigram background.

    With q the frequencies of a Zipf-Mandelbrot law in random order of the classes, u the first unit vector
    and g_k Gaussian of about unit length orthogonal to u,

        C_k = ¼ (log q_k − mean) u + g_k,
        e_i = 4 u + Σ_j s_ij g_{k_ij} / ‖g_{k_ij}‖² + ½ noise,

    where k_i0 = y_i ~ q is the target and k_i1 … k_i4 ~ q are rivals. s_ij is what lifts a class from the
    background to its place: rivals have 50, 25, 10 and 5% of the mass that the target leaves, the background
    has 10%, and the target has log-odds t_i ~ N(2, 5²). So two thirds of the targets have a probability
    above ½, a few are missed by far, and the mean loss is about E log(1 + exp(−t)) = 1.3 nats; it is
    measured and reported. D should be in the hundreds, since the spikes' cross-talk grows with 1/√D.
    """
    log_q = -(torch.randperm(v, generator=generator) + 2.7).log()
    log_q -= log_q.logsumexp(0)
    c = torch.randn(v, d, generator=generator).div_(math.sqrt(d))
    c[:, 0] = 0
    classes = torch.multinomial(log_q.exp(), n * 5, replacement=True, generator=generator).view(n, 5)
    lift = _lifts(log_q[classes], d, generator)
    e = torch.randn(n, d, generator=generator).mul_(_NOISE)
    e[:, 0] = 4
    for j in range(5):
        spikes = c[classes[:, j]]
        e += spikes * (lift[:, j] / spikes.square().sum(1)).unsqueeze(1)
    c[:, 0] = (log_q - log_q.mean()) / 4
    return e, c, classes[:, 0].contiguous()


def _lifts(log_q: Tensor, d: int, generator: torch.Generator) -> Tensor:
    """Return s (N, 5) for the log-frequencies of targets and rivals, shape (N, 5)."""
    mean, std = _CONFIDENCE
    odds = torch.tensor([1.0, *_RIVALS]).log().expand_as(log_q).clone()
    odds[:, 0] = mean + std * torch.randn(len(log_q), generator=generator)
    wanted = odds - math.log(_REST) - log_q
    # Noise and cross-talk of variance w on all classes raise the background's log-sum by w/2, so that the
    # spikes must rise too, which adds cross-talk. Bounded, since that has no end for a tiny D.
    background = torch.full((len(log_q), 1), _NOISE**2 / 2)
    for _ in range(4):
        talk = (wanted + background).square().sum(1, keepdim=True) / d
        background = ((_NOISE**2 + talk) / 2).clamp(max=4.0)
    return wanted + background
