"""What is measured after a round. m usable replies g_i = w_i − w⁰; w⁺ is the next global model."""

from collections.abc import Mapping

import numpy as np
import torch

from lossworks.cohort import Member, Stack
from lossworks.tasks.interface import Mode
from lossworks_federated.server.screening import Received
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.strategies.interface import OwnTest

_EXAMPLES_AT_ONCE = 2**17  # times the clients whose models are measured together


def held_out(setup: SharedSetup, model: Member) -> dict[str, float]:
    """Return the training loss and the yardsticks of the task on held-out rows."""
    rows = np.arange(len(setup.held_out))
    (found,) = setup.learner.measured(_only(model), setup.held_out, [rows])
    return {f"server/{name.removeprefix('eval/')}": value for name, value in found.metrics().items()}


def loss_terms(setup: SharedSetup, received: Received, new: Member) -> dict[str, float]:
    """Return the three terms that the global loss falls into (Zeng, Guo et al. 2024, FedLD).

    With L the loss on the held-out rows, L_i that on client i's training rows, and p_i its share of rows:
    local Σ p_i L_i(w_i), distribution shift Σ p_i (L(w_i) − L_i(w_i)) and aggregation L(w⁺) − Σ p_i L(w_i);
    they add up to L(w⁺).
    """
    p = received.examples / received.examples.sum()
    local = float(p @ received.column("loss-after"))
    data = setup.held_out
    rows = np.arange(len(data))
    at_once = max(1, _EXAMPLES_AT_ONCE // len(rows))
    own: list[float] = []
    for start in range(0, len(p), at_once):
        some = received.params(slice(start, start + at_once))
        own += setup.learner.losses(some, data, [rows] * len(next(iter(some.values()))))
    apart = float(p @ torch.tensor(own, dtype=torch.float64))
    (whole,) = setup.learner.losses(_only(new), data, [rows])
    return {
        "terms/local": local,
        "terms/shift": apart - local,
        "terms/aggregation": whole - apart,
        "terms/global": whole,
    }


def _only(model: Member) -> Stack:
    return {name: value[None] for name, value in model.items()}


def drift(received: Received, origin: Member, new: Member) -> dict[str, float]:
    """Return how far the clients went, and how far apart.

    Returns:
        ``norm``, the mean ‖g_i‖; ``disagreement``, √(mean ‖g_i − ḡ‖²/mean ‖g_i‖²), 0 where all agree;
        ``cosine``, the mean cosine of g_i with their mean ḡ; ``applied_norm``, that of w⁺ − w⁰ over ‖ḡ‖, and
        ``applied_cosine``, its cosine with ḡ. ḡ is weighted by examples.
    """
    m = len(received.partitions)
    p = (received.examples / received.examples.sum()).float()
    squares, inner = torch.zeros(m, dtype=torch.float64), torch.zeros(m, dtype=torch.float64)
    mean_square = applied_square = applied_inner = 0.0
    for name, update in received.updates.items():
        flat = update.reshape(m, -1)
        mean = p.to(flat) @ flat
        applied = (new[name] - origin[name]).flatten()
        squares += torch.linalg.vector_norm(flat, dim=1).double().square()
        inner += (flat @ mean).double()
        mean_square += float(mean.double() @ mean.double())
        applied_square += float(applied.double() @ applied.double())
        applied_inner += float(applied.double() @ mean.double())
    apart = (squares - 2 * inner + mean_square).clamp(min=0)
    length, tiny = mean_square**0.5, 1e-30
    return {
        "drift/norm": float(squares.sqrt().mean()),
        "drift/disagreement": float((apart.mean() / squares.mean().clamp(min=tiny)).sqrt()),
        "drift/cosine": float((inner / (squares.sqrt() * length).clamp(min=tiny)).mean()),
        "drift/applied_norm": applied_square**0.5 / max(length, tiny),
        "drift/applied_cosine": applied_inner / max(applied_square**0.5 * length, tiny),
    }


def spread(tested: Mapping[int, OwnTest], name: str, best: Mode) -> dict[str, float]:
    """Return how a figure of the clients on their own test rows is spread.

    Args:
        tested: Each client's last test.
        name: The figure.
        best: Which is better.

    Returns:
        ``mean`` over clients, ``weighted`` by rows, ``worst10``, the mean of the worst tenth (at least one),
        ``std``, and the worst, ``min`` or ``max``; nothing if no client knows the figure.
    """
    known = [one for one in tested.values() if name in one.figures]
    if not known:
        return {}
    values = np.array([one.figures[name] for one in known])
    examples = np.array([one.examples for one in known])
    worst = np.sort(values if best == "max" else -values)[: max(1, round(0.1 * len(values)))]
    found = {
        "mean": values.mean(),
        "weighted": np.average(values, weights=examples),
        "worst10": worst.mean() if best == "max" else -worst.mean(),
        "std": values.std(),
        **({"min": values.min()} if best == "max" else {"max": values.max()}),
    }
    return {f"clients/{name}_{which}": float(value) for which, value in found.items()}
