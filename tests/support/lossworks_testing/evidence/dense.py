"""Studies of bags, rare classes, values that move, sets of labels, and learning rates."""

import inspect
from collections.abc import Callable, Iterable
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.entries.losses.classification.aggregate import linear_solution
from lossworks.losses import create
from lossworks_testing.evidence.study import Study

Objective = Callable[[Tensor, Tensor], Tensor]

_FIRST = 100  # seeds from here on: settings were tried on smaller ones
_STEPS = 1200  # of the character models


def digits() -> tuple[Tensor, Tensor]:
    """Return images (1797, 64) in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def perceptron(inputs: int, width: int, outputs: int, seed: int, hidden: int = 2) -> nn.Module:
    """Return a perceptron of some hidden layers."""
    torch.manual_seed(seed)
    sizes = [inputs, *[width] * hidden]
    layers = chain.from_iterable((nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(sizes))
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _binary(f: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(f, y.float())


def rare_class(seeds: int) -> Study:
    """Find a class of twenty examples among nine hundred."""
    study = Study(
        "dice, self-adjusting-dice, tversky",
        "After a warm start the batch form of self-adjusting Dice has a higher F1 on a rare class than "
        "cross-entropy, and the weight of missed positives raises recall. From scratch the form of single "
        "examples collapses to next to no positive.",
        "Digits, class 8 cut to 20 of about 800, 64-64-1 perceptron, 100 full-batch steps of cross-entropy "
        "and 400 of the loss, Adam at 0.01; on the other images, of the rare class; ten seeds.",
    )
    of_two = create("dice", classes="but-first")

    def single(f: Tensor, y: Tensor) -> Tensor:
        return of_two(torch.stack((torch.zeros_like(f), f), -1), y)

    losses: dict[str, tuple[Objective, int]] = {
        "cross-entropy": (_binary, 100),
        "batch Dice": (create("batch-dice"), 100),
        "batch self-adjusting Dice": (create("batch-self-adjusting-dice"), 100),
        "batch Tversky, α = 0.2, β = 0.8": (create("batch-tversky", alpha=0.2, beta=0.8), 100),
        "batch Tversky, α = 0.8, β = 0.2": (create("batch-tversky", alpha=0.8, beta=0.2), 100),
        "Dice of examples, from scratch": (single, 0),
    }
    for seed in range(_FIRST, _FIRST + 2 * seeds):
        for row, (loss, warm) in losses.items():
            f1, recall = _rare_eights(loss, seed, warm)
            study.add(row, "F1", f1)
            study.add(row, "recall", recall)
    return study


def _rare_eights(loss: Objective, seed: int, warm: int) -> tuple[float, float]:
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:900], order[900:]
    train = torch.cat((train[y[train] == 8][:20], train[y[train] != 8]))
    inputs, labels = x[train], (y[train] == 8).long()
    model = perceptron(64, 64, 1, seed, hidden=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(warm + 400):
        objective = _binary if step < warm else loss
        descend(optimizer, objective(model(inputs).squeeze(1), labels))
    predicted, actual = model(x[test]).squeeze(1) > 0, y[test] == 8
    true = int((predicted & actual).sum())
    return 2 * true / max(1, int(predicted.sum() + actual.sum())), true / int(actual.sum())


def moving_targets(seeds: int) -> Study:
    """Regress a wave whose level jumps twice."""
    study = Study(
        "two-hot, hl-gauss",
        "A value head of bins follows targets whose level moves, which squared error loses.",
        "256 digits, targets sin(1e5⟨u, x⟩) + b with b = 0, 8, 16 in turn, 64-128-128 perceptron, 500 "
        "full-batch steps of Adam at 0.001 each, 101 bins on [−40, 40]; squared error at the end of a stage.",
    )
    for seed in range(_FIRST, _FIRST + seeds):
        for row, slug in (("squared error", None), ("two-hot", "two-hot"), ("hl-gauss", "hl-gauss")):
            for stage, error in enumerate(_drifting(slug, seed), start=1):
                study.add(row, f"stage {stage}", error)
    return study


def _drifting(slug: str | None, seed: int) -> Iterable[float]:
    generator = torch.Generator().manual_seed(seed)
    x = digits()[0][torch.randperm(1797, generator=generator)[:256]]
    wave = torch.sin(1e5 * (x @ torch.randn(64, generator=generator)))
    loss = create(slug, bins=101, v_min=-40.0, v_max=40.0) if slug else None
    model = perceptron(64, 128, 101 if loss else 1, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for offset in (0, 8, 16):
        y = wave + offset
        for _ in range(500):
            out = model(x)
            descend(optimizer, loss(out, y) if loss else F.mse_loss(out.squeeze(1), y))
        decoded = loss.decode(model(x)) if loss else model(x).squeeze(1)
        yield F.mse_loss(decoded, y).item()


def _coupled(scores: Tensor, positives: Tensor) -> Tensor:
    """Return cross-entropy averaged over the positives."""
    return -scores.log_softmax(1).gather(1, positives).mean()


def certain_label(seeds: int) -> Study:
    """Learn scores of which one label is always positive, beside four that change."""
    study = Study(
        "decoupled-softmax",
        "Cross-entropy averaged over positives holds a certain label at 1/|P| = 0.2; decoupled, it may be "
        "certain.",
        "32 queries, 100 labels, free scores, 400 steps of Adam at 0.1.",
    )
    for seed in range(_FIRST, _FIRST + seeds):
        for row, loss in (
            ("cross-entropy of all positives", _coupled),
            ("decoupled-softmax", create("decoupled-softmax", temperature=1.0)),
        ):
            study.add(row, "softmax probability of the certain label", _certain(loss, seed))
    return study


def _certain(loss: Objective, seed: int, labels: int = 100) -> float:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(32, labels, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(400):
        others = torch.rand(32, labels - 1, generator=generator).topk(4).indices + 1
        descend(optimizer, loss(scores, torch.cat((others.new_zeros(32, 1), others), 1)))
    return float(scores.detach().softmax(1)[:, 0].mean())


def rates(seeds: int) -> Study:
    """Train at seven learning rates, with and without a norm before the head."""
    study = Study(
        "lr-sensitivity",
        "A normalisation makes the loss depend less on the learning rate.",
        "Characters of two modules of the standard library, 8 before the next, 128 features, 1,200 steps of "
        "Adam with batches of 256 at seven rates from 0.0003 to 0.3; mean excess over the best rate.",
    )
    text = "".join(inspect.getsource(module) for module in (inspect, torch.utils._pytree))
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(letter) for letter in text])
    entry = create("lr-sensitivity")
    for seed in range(_FIRST, _FIRST + seeds):
        for row, norm in (("plain", False), ("with a norm before the head", True)):
            losses = {r: _characters(codes, len(alphabet), r, seed, norm=norm) for r in entry.grid}
            start = float(torch.tensor(float(len(alphabet))).log())
            study.add(row, "sensitivity", entry.of_grid(losses, start))
            study.add(row, "best loss", min(losses.values()))
    return study


def _characters(codes: Tensor, letters: int, rate: float, seed: int, *, norm: bool) -> float:
    torch.manual_seed(seed)
    last = nn.LayerNorm(128, elementwise_affine=False) if norm else nn.Identity()
    model = nn.Sequential(
        nn.Embedding(letters, 16),
        nn.Flatten(),
        nn.Linear(128, 128),
        nn.ReLU(),
        last,
        nn.Linear(128, letters),
    )
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    recent = []
    for step in range(_STEPS):
        at = torch.randint(0, len(codes) - 9, (256,), generator=generator)
        loss = F.cross_entropy(model(codes[at[:, None] + torch.arange(8)]), codes[at + 8])
        descend(optimizer, loss)
        if step >= _STEPS - 50:
            recent.append(float(loss.detach()))
    return sum(recent) / len(recent)


def bags(seeds: int) -> Study:
    """Fit linear models to the mean responses of random bags."""
    study = Study(
        "aggregate-interpolation",
        "The larger the bags, the more an interior ρ is ahead of the bag loss; it is ahead of the instance "
        "loss as well.",
        "Gaussian features, d = 100, n = 1,000, signal-to-noise ratio 1; squared error of θ.",
    )
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(1000, 100, dtype=torch.float64, generator=g)
        theta = F.normalize(torch.randn(100, dtype=torch.float64, generator=g), dim=0)
        y = x @ theta + torch.randn(1000, dtype=torch.float64, generator=g)
        for k in (2, 5, 8):
            for rho in (0.0, 0.1, 0.2, 1.0):
                error = (linear_solution(x, y, k, rho) - theta).square().sum()
                study.add(f"ρ = {rho:g}", f"bags of {k}", error)
    return study
