"""One measurement of ``lossworks bench losses`` in a process of its own; prints the figures as JSON."""

import json
import sys
from typing import Any

import torch
from torch import Tensor

from lossworks.benchmarks.linear_ce.head_inputs import make_inputs
from lossworks.benchmarks.worker import median_seconds, peak_growth
from lossworks.entries.losses.classification.factored_head import FactoredHead
from lossworks.head import linear_cross_entropy
from lossworks.losses import create

_SEQUENCES = 16  # into which a sequence loss's rows are cut
_LR = 0.01


def measure_loss(case: dict[str, Any]) -> dict[str, float]:
    """Return seconds of a loss with its gradients, of cross-entropy and of a product, and the memory."""
    e, c, y = make_inputs(case["n"], case["v"], case["d"], "peaked", "fp32", "cpu", case["seed"])
    loss = create(case["slug"], reduction="sum", **_without_logits(case["slug"]))
    if loss.kind == "sequence":
        cut = (_SEQUENCES, -1)
        e, y = e.detach().reshape(*cut, case["d"]).requires_grad_(), y.reshape(cut)

    def own() -> tuple[Tensor, ...]:
        value = loss.linear(e, c, y)
        return value.detach(), *torch.autograd.grad(value, (e, c))

    def plain() -> tuple[Tensor, ...]:
        value = linear_cross_entropy(e, c, y, reduction="sum", filter_eps=None)
        if not isinstance(value, Tensor):
            raise TypeError(value)
        return value.detach(), *torch.autograd.grad(value, (e, c))

    loss.linear(e[:1], c, y[:1]).backward()
    e.grad = c.grad = None
    growth, _, _ = peak_growth(own, "cpu")
    product = torch.no_grad()(lambda: e.reshape(-1, case["d"]) @ c.t())
    loss_s, cross_entropy_s, product_s = median_seconds((own, plain, product), case["repeats"], "cpu")
    return {
        "loss_s": loss_s,
        "cross_entropy_s": cross_entropy_s,
        "product_s": product_s,
        "extra_bytes": max(0, growth - 4 * (e.numel() + c.numel())),
    }


def _without_logits(slug: str) -> dict[str, Any]:
    """Return the settings with which a loss needs no logits, where its defaults do."""
    return {"normalisation": "none", "temperature": 1.0} if create(slug).needs_logits else {}


def measure_steps(case: dict[str, Any]) -> dict[str, list[float]]:
    """Return seconds of a step of gradient descent by number of classes, factored and on dense weights."""
    generator = torch.Generator().manual_seed(case["seed"])
    hidden = torch.randn(case["rows"], case["features"], generator=generator)
    loss = create("spherical-z-loss")
    calls = []
    for classes in case["classes"]:
        weight = torch.randn(classes, case["features"], generator=generator)
        targets = torch.randint(0, classes, (case["rows"],), generator=generator)
        head = FactoredHead(weight, loss, recondition_every=10**9)
        calls.append(lambda head=head, targets=targets: head.step(hidden, targets, _LR))
        calls.append(lambda weight=weight, targets=targets: dense_step(weight, hidden, targets, loss))
    seconds = median_seconds(tuple(calls), case["repeats"], "cpu")
    return {"factored_s": seconds[::2], "dense_s": seconds[1::2]}


def dense_step(weight: Tensor, hidden: Tensor, targets: Tensor, loss: Any) -> Tensor:
    """Take the same step on dense weights, without logits, and return the gradient of the features.

    Args:
        weight: C, shape (V, D).
        hidden: E, shape (N, D).
        targets: Shape (N,), int64.
        loss: A row loss of the catalogue.

    Returns:
        ∂L/∂E, shape (N, D).
    """
    w, h = weight.requires_grad_(), hidden.detach().requires_grad_()
    of_w, of_h = torch.autograd.grad(loss.linear(h, w, targets), (w, h))
    with torch.no_grad():
        weight -= _LR * of_w
    return of_h


def main() -> None:
    """Measure the case in the first argument."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    print(json.dumps(measure_loss(case) if "slug" in case else measure_steps(case)), flush=True)


if __name__ == "__main__":
    main()
