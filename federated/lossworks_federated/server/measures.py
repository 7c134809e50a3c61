"""What is measured after a round. m usable replies g_i = w_i − w⁰; w⁺ is the next global model."""

from collections.abc import Mapping

import numpy as np
import torch

from lossworks.cohort import Member
from lossworks.metrics.classification import class_sums
from lossworks_federated.server.screening import Received
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.strategies.interface import OwnTest

_EXAMPLES_AT_ONCE = 2**17  # times the clients whose models are tested together


@torch.no_grad()
def held_out(setup: SharedSetup, model: Member) -> dict[str, float]:
    """Return the yardsticks of a classifier on held-out examples."""
    examples = setup.data.held_out
    _, logits = setup.model({name: value[None] for name, value in model.items()}, examples.inputs[None])
    found = class_sums(logits[0], examples.labels).metrics()
    return {f"server/{name}": value for name, value in found.items()}


@torch.no_grad()
def loss_terms(setup: SharedSetup, received: Received, new: Member) -> dict[str, float]:
    """Return the three terms that the global loss falls into (Zeng, Guo et al. 2024, FedLD).

    With L the loss on the held-out examples, L_i that on client i's training examples, and p_i its share of
    examples: local Σ p_i L_i(w_i), distribution shift Σ p_i (L(w_i) − L_i(w_i)) and aggregation
    L(w⁺) − Σ p_i L(w_i); they add up to L(w⁺).
    """
    p = received.examples / received.examples.sum()
    local = float(p @ received.column("loss-after"))
    inputs, labels = setup.data.held_out.inputs, setup.data.held_out.labels
    at_once = max(1, _EXAMPLES_AT_ONCE // len(inputs))
    own: list[float] = []
    for start in range(0, len(p), at_once):
        some = received.params(slice(start, start + at_once))
        count = len(next(iter(some.values())))
        _, logits = setup.model(some, inputs.expand(count, *inputs.shape))
        own += setup.loss(logits, labels.expand(count, -1)).double().mean(1).tolist()
    apart = float(p @ torch.tensor(own, dtype=torch.float64))
    _, logits = setup.model({name: value[None] for name, value in new.items()}, inputs[None])
    whole = float(setup.loss(logits[0], labels).double().mean())
    return {
        "terms/local": local,
        "terms/shift": apart - local,
        "terms/aggregation": whole - apart,
        "terms/global": whole,
    }


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
        flat = update.flatten(1)
        mean = p @ flat
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


def spread(tested: Mapping[int, OwnTest]) -> dict[str, float]:
    """Return how the clients' accuracies on their own test examples are spread.

    Returns:
        ``mean`` over clients, ``weighted`` by examples, ``worst10``, the mean of the worst tenth (at least
        one), ``std`` and ``min``; nothing if no client has test examples.
    """
    if not tested:
        return {}
    accuracies = np.array([one.accuracy for one in tested.values()])
    examples = np.array([one.examples for one in tested.values()])
    worst = np.sort(accuracies)[: max(1, round(0.1 * len(accuracies)))]
    found = {
        "mean": accuracies.mean(),
        "weighted": np.average(accuracies, weights=examples),
        "worst10": worst.mean(),
        "std": accuracies.std(),
        "min": accuracies.min(),
    }
    return {f"clients/accuracy_{name}": float(value) for name, value in found.items()}
