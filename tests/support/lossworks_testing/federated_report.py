"""Tables and picture of the federated study, from docs/federated-study.json."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lossworks.metrics.intervals import Mean
from lossworks_federated.specs import StrategySpec
from lossworks_testing.federated_study import RESULTS, STUDY, best_lr, cells, key

PICTURE = Path("docs/federated-study.png")
_HEAD = """## federated strategies

Held-out accuracy over the last ten measured rounds (the last 20), five seeds, mean ± 95 % interval; each
strategy with the clients' learning rate of {grid} that was best on two other seeds in the same cell. digits:
64-64-10 perceptron, 40 rounds; mnist1d: 40-64-64-10 perceptron, 60 rounds; two local epochs of batches of 32.
Of five clients all take part, of fifty ten a round. (paper) and (reference) say which variant of FedLD and
FedLEx it is; `rescale` is ours. All of it is in `federated-study.yaml` of the folder
`tests/support/lossworks_testing`; every run is in `docs/federated-study.json`, written by
`PYTHONPATH=tests/support python -m lossworks_testing.federated_study`.

![accuracy over skew](federated-study.png)
"""
_FOUND = """What it says, and no more than that of two small tasks and small perceptrons:

- Neither FedLD nor FedLEx is above FedAvg beyond the intervals in any cell, in either variant, and both
  fall further behind the more the labels differ. FedLD's update is shorter where clients disagree and
  points elsewhere; FedLEx's multipliers leave most parameters nearly still.
- Giving FedLD's update the norm of the mean (`rescale=norm`) wins back two thirds of the distance under
  severe skew on digits, dividing FedLEx's matrix by its mean (`rescale=mean`) nine tenths: in most cells
  it is within FedAvg's interval. So what they lose is mostly length, and for FedLD also direction.
- FedDyn and FedAdam are the best under skew where ten of fifty clients take part, by 1 to 2 points on
  digits and 6 to 10 on mnist1d. SCAFFOLD leads with five clients on digits, and falls behind FedAvg with
  ten of fifty and severe skew: its control variates are old there. FedProx and FedNova are near FedAvg
  everywhere.
- A learning rate of 1, the best on two seeds, diverged on one of five others (for instance FedAvg's,
  mnist1d, five clients, α = 100): hence the widest intervals. It is left as it came."""


class Results:
    """The study's runs, by cell and strategy."""

    def __init__(self) -> None:
        self.study = yaml.safe_load(STUDY.read_text())
        self.runs = json.loads(RESULTS.read_text())
        self.strategies = [StrategySpec.model_validate(one) for one in self.study["base"]["strategies"]]
        self.cells = list(cells(self.study))
        self.titles = [one.title.replace(" margin=0.1", "") for one in self.strategies]

    def lr(self, cell: int, strategy: int) -> float:
        """Return the learning rate that was chosen."""
        return best_lr(self.runs, self.study, self.cells[cell], strategy)

    def values(self, cell: int, strategy: int, figure: str) -> list[float]:
        """Return a figure of every seed at the chosen learning rate."""
        lr = self.lr(cell, strategy)
        return [self.runs[key(self.cells[cell], strategy, lr, s)][figure] for s in self.study["seeds"]]

    def groups(self) -> list[tuple[str, list[int]]]:
        """Return the cells of each data set and number of clients, from little to much skew."""
        sizes = [len(part) for part in self.study["cells"].values()]
        numbers = list(itertools.product(*map(range, sizes)))
        parts = list(self.study["cells"].values())
        found: dict[str, list[int]] = {}
        for index, (data, clients, _) in enumerate(numbers):
            name = f"{parts[0][data]['data']['source']}, {parts[1][clients]['split.clients']} clients"
            found.setdefault(name, []).append(index)
        return list(found.items())

    def skews(self) -> list[str]:
        """Return the splits in words."""
        return [f"α = {part['split.alpha']}" for part in self.study["cells"]["skew"]]


def section() -> str:
    """Return the section of docs/evidence-by-script.md."""
    results = Results()
    parts = [_HEAD.format(grid=", ".join(map(str, results.study["lr"])))]
    for name, numbers in results.groups():
        parts.append(_accuracies(results, name, numbers))
    parts += [_further(results), _FOUND]
    return "\n\n".join(parts)


def _accuracies(results: Results, name: str, numbers: Sequence[int]) -> str:
    head = " | ".join(f"{skew} | lr" for skew in results.skews())
    lines = [f"**{name}**", "", f"| | {head} |", "| --- |" + " --- |" * (2 * len(numbers))]
    for strategy, title in enumerate(results.titles):
        columns = []
        for cell in numbers:
            mean = Mean.of(results.values(cell, strategy, "accuracy"))
            columns += [mean.text("{:.3f}") if mean else "diverged", f"{results.lr(cell, strategy):g}"]
        lines.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _further(results: Results) -> str:
    """Return worst tenth, rounds and bytes to the target under severe skew."""
    lines = [
        "Under severe skew (α = 0.1): accuracy of the worst tenth of clients on their own tests, rounds to"
    ]
    lines[0] += (
        " 80 % (digits) or 50 % (mnist1d) accuracy, MiB to it; in brackets, how many of five seeds got there."
    )
    groups = results.groups()
    head = " | ".join(f"{name}: worst tenth | rounds | MiB" for name, _ in groups)
    lines += ["", f"| | {head} |", "| --- |" + " --- |" * (3 * len(groups))]
    for strategy, title in enumerate(results.titles):
        columns = []
        for _, numbers in groups:
            worst = Mean.of(results.values(numbers[-1], strategy, "worst10"))
            columns.append(worst.text("{:.2f}") if worst else "–")
            columns += [_to_target(results, numbers[-1], strategy, what) for what in ("rounds", "bytes")]
        lines.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _to_target(results: Results, cell: int, strategy: int, what: str) -> str:
    values = results.values(cell, strategy, f"{what}_to_target")
    found = [value for value in values if math.isfinite(value)]
    if not found:
        return "–"
    mean = np.mean(found) / (2**20 if what == "bytes" else 1)
    return f"{mean:.3g} ({len(found)})"


def draw(path: Path = PICTURE) -> None:
    """Draw accuracy over skew, a panel a data set and number of clients, a line a strategy."""
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    from lossworks.reporting.picture_style import STYLE

    results = Results()
    with rc_context(STYLE):
        figure = Figure(figsize=(17, 10), dpi=100, layout="constrained", facecolor="white")
        panels: Any = figure.subplots(2, 2).flat
        colours = colormaps["tab20"]
        for axes, (name, numbers) in zip(panels, results.groups(), strict=True):
            axes.set_title(name)
            for strategy, title in enumerate(results.titles):
                means = [Mean.of(results.values(cell, strategy, "accuracy")) for cell in numbers]
                # Side by side, or the intervals hide each other.
                places = np.arange(len(numbers)) + (strategy - len(results.titles) / 2) * 0.05
                axes.errorbar(
                    places,
                    [mean.value if mean else math.nan for mean in means],
                    [(mean.half_width or 0.0) if mean else 0.0 for mean in means],
                    color=colours(strategy),
                    marker="o",
                    markersize=4,
                    linewidth=1.3,
                    capsize=2,
                    label=title,
                )
            axes.set_xticks(range(len(numbers)), results.skews())
            axes.set(ylabel="held-out accuracy")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
        figure.savefig(path, format="png")


if __name__ == "__main__":
    draw()
    print(section())
