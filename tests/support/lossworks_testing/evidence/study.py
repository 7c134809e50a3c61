"""What studies share: tables with confidence intervals, and a small training loop."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


@dataclass
class Study:
    """A table of a study: for each setting and figure the values by seed.

    Attributes:
        slug: Entry of the catalogue that is on trial.
        claim: What the paper says, in one sentence.
        setting: Data, model and training, in one sentence.
        values: (setting, figure) to the values, one a seed.
    """

    slug: str
    claim: str
    setting: str
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def add(self, row: str, figure: str, value: float) -> None:
        """Add the value of one more seed."""
        self.values.setdefault((row, figure), []).append(float(value))

    def mean(self, row: str, figure: str) -> float:
        """Return the mean over seeds."""
        return statistics.fmean(self.values[row, figure])

    def gain(self, row: str, over: str, figure: str) -> tuple[float, float]:
        """Return the mean difference of two settings, seed by seed, and half its 95 % interval."""
        pairs = zip(self.values[row, figure], self.values[over, figure], strict=True)
        return interval([a - b for a, b in pairs])

    def markdown(self) -> str:
        """Return the table."""
        figures = list(dict.fromkeys(figure for _, figure in self.values))
        rows = list(dict.fromkeys(row for row, _ in self.values))
        lines = [f"## {self.slug}", "", f"{self.claim} {self.setting}", ""]
        lines += [f"| | {' | '.join(figures)} |", "| --- |" + " --- |" * len(figures)]
        for row in rows:
            cells = [
                "{:.3f} ± {:.3f}".format(*interval(self.values[row, figure]))
                if (row, figure) in self.values
                else "–"
                for figure in figures
            ]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the 95 % confidence interval of the mean."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, _T[min(len(values) - 1, 9)] * statistics.stdev(values) / math.sqrt(len(values))


def mlp(inputs: int, width: int, outputs: int, seed: int) -> nn.Module:
    """Return a perceptron of one hidden layer, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, outputs))


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    seed: int,
    lr: float = 2e-3,
    batch: int | None = 64,
    each_epoch: Callable[[int], object] = lambda _: None,
) -> nn.Module:
    """Train with Adam on shuffled batches, or on all rows at once for ``batch=None``."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=generator).split(batch or len(x)):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        each_epoch(epoch)
    return model
