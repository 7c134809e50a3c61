"""Figures of every strategy of a federation, over its seeds."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lossworks.metrics.intervals import MeanInterval
from lossworks.reporting.series import Series, series
from lossworks.tracking import read_all
from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.rounds import FederationOutcome
from lossworks_federated.server.screening import REASONS
from lossworks_federated.server.session import Child, Session

_LAST = 10  # measured rounds whose mean is reported: a last or best round says less


@dataclass(frozen=True, eq=False)
class ComparedStrategy:
    """One strategy with one seed.

    Attributes:
        strategy: Title of the strategy.
        seed: The seed.
        curves: Steps and values by metric.
        outcome: How it ended.
        figures: that of the yardstick by its name and worst10 (means of the last 10 measured rounds), last
            and best (of the yardstick; best_round is the best's), rounds_to_target, bytes_to_target and
            virtual_to_target (NaN if not reached), bytes, seconds_per_round, left_out, virtual_seconds (of
            all rounds; NaN where no virtual time passes), personal and personal_worst10
            (of models that clients fine-tuned; NaN where they did not), gain, helped and hurt (what that
            changes, and how many clients it helps and hurts); epsilon, at the spec's privacy.delta, where
            there is privacy.
    """

    strategy: str
    seed: int
    curves: dict[str, Series]
    outcome: FederationOutcome | None
    figures: dict[str, float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All entries that have measured something.

    Attributes:
        entries: By seed, then strategy.
        target: Held-out figure that rounds and bytes are counted to, if any.
        yardstick: What is compared.
    """

    entries: tuple[ComparedStrategy, ...]
    target: float | None
    yardstick: Yardstick

    @property
    def strategies(self) -> list[str]:
        """Return the titles in their order."""
        return list(dict.fromkeys(entry.strategy for entry in self.entries))

    def of(self, strategy: str) -> list[ComparedStrategy]:
        """Return a strategy's entries."""
        return [entry for entry in self.entries if entry.strategy == strategy]

    def mean(self, strategy: str, figure: str) -> MeanInterval | None:
        """Return a figure's mean over seeds."""
        return MeanInterval.of([entry.figures.get(figure, math.nan) for entry in self.of(strategy)])

    def difference(self, strategy: str) -> MeanInterval | None:
        """Return the mean over seeds of the yardstick less that of the first strategy with the same seed."""
        name, base = self.yardstick.name, {one.seed: one for one in self.of(self.strategies[0])}
        pairs = [(one, base[one.seed]) for one in self.of(strategy) if one.seed in base]
        return MeanInterval.of(
            [one.figures.get(name, math.nan) - other.figures.get(name, math.nan) for one, other in pairs]
        )

    @property
    def timed(self) -> bool:
        """Whether virtual time has passed."""
        return any("virtual/seconds" in entry.curves for entry in self.entries)

    @property
    def personalised(self) -> bool:
        """Whether clients have fine-tuned the global model."""
        return any("personal/mean" in entry.curves for entry in self.entries)

    def reached(self, strategy: str) -> str:
        """Return in words how many seeds reached the target and after how many rounds."""
        own = self.of(strategy)
        rounds = [entry.figures["rounds_to_target"] for entry in own]
        found = [value for value in rounds if math.isfinite(value)]
        if not found:
            return "not reached"
        shown = f"{np.mean(found):.0f}"
        return shown if len(found) == len(own) else f"{shown} ({len(found)} of {len(own)} seeds)"

    def write_csv(self, path: Path) -> None:
        """Write one line a strategy and seed."""
        names = list(dict.fromkeys(name for entry in self.entries for name in entry.figures))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["strategy", "seed", "status", *names])
            for entry in self.entries:
                status = entry.outcome.status if entry.outcome else "running"
                figures = [f"{entry.figures.get(name, math.nan):.6g}" for name in names]
                writer.writerow([entry.strategy, entry.seed, status, *figures])


def compare(session: Session) -> Comparison:
    """Return the figures of a federation's children, from their journals."""
    target, yardstick = session.spec.measure.target, Yardstick.of(session.spec)
    begun = [child for child in session.children if child.files.journal.is_file()]
    entries = [_entry(child, target, yardstick) for child in begun]
    return Comparison(tuple(entry for entry in entries if entry.curves), target, yardstick)


def _curves(journal: Path) -> dict[str, Series]:
    rows = read_all(journal)
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    return {name: found for name in names if (found := series(rows, name)) is not None}


def figures_of(journal: Path, target: float | None, yardstick: Yardstick) -> dict[str, float]:
    """Return the figures of one journal; see :class:`ComparedStrategy`."""
    return _figures(_curves(journal), target, yardstick)


def _entry(child: Child, target: float | None, yardstick: Yardstick) -> ComparedStrategy:
    curves = _curves(child.files.journal)
    outcome, figures = child.outcome, _figures(curves, target, yardstick)
    if outcome is not None and "privacy/epsilon" in outcome.metrics:
        # Not of the curve, which has the first value of a round that was repeated.
        figures["epsilon"] = outcome.metrics["privacy/epsilon"]
    return ComparedStrategy(child.strategy.title, child.seed, curves, outcome, figures)


def _left_out(curves: dict[str, Series]) -> float:
    """Return how many replies were left out; NaN where no round came to its end."""
    found = [curves[f"round/{reason}"][1].sum() for reason in REASONS if f"round/{reason}" in curves]
    return float(sum(found)) if found else math.nan


def _figures(curves: dict[str, Series], target: float | None, yardstick: Yardstick) -> dict[str, float]:
    figures = {
        yardstick.name: _last(curves, yardstick.curve),
        "last": _at(curves, yardstick.curve, -1),
        **_best(curves, yardstick),
        "worst10": _last(curves, f"clients/{yardstick.name}_worst10"),
        "clients": _last(curves, f"clients/{yardstick.name}_mean"),
        "bytes": _at(curves, "bytes/down", -1) + _at(curves, "bytes/up", -1),
        "left_out": _left_out(curves),
        "seconds_per_round": _seconds(curves),
        "virtual_seconds": _at(curves, "virtual/seconds", -1),
        "personal": _at(curves, "personal/mean", -1),
        "personal_worst10": _at(curves, "personal/worst10", -1),
        "gain": _at(curves, "personal/gain", -1),
        "helped": _at(curves, "personal/helped", -1),
        "hurt": _at(curves, "personal/hurt", -1),
    }
    if target is not None:
        figures |= _to_target(curves, target, yardstick)
    return figures


def _best(curves: dict[str, Series], yardstick: Yardstick) -> dict[str, float]:
    if yardstick.curve not in curves:
        return {"best": math.nan, "best_round": math.nan}
    rounds, values = curves[yardstick.curve]
    place = int((yardstick.sign * values).argmax())
    return {"best": float(values[place]), "best_round": float(rounds[place])}


def _to_target(curves: dict[str, Series], target: float, yardstick: Yardstick) -> dict[str, float]:
    rounds, values = curves.get(yardstick.curve, (np.zeros(0), np.zeros(0)))
    reached = np.flatnonzero(yardstick.reached(values, target))
    if not len(reached):
        return dict.fromkeys(("rounds_to_target", "bytes_to_target", "virtual_to_target"), math.nan)
    first = float(rounds[reached[0]])
    sent = sum(_until(curves, name, first, 0.0) for name in ("bytes/down", "bytes/up"))
    virtual = _until(curves, "virtual/seconds", first, math.nan)
    return {"rounds_to_target": first, "bytes_to_target": sent, "virtual_to_target": virtual}


def _until(curves: dict[str, Series], name: str, step: float, otherwise: float) -> float:
    """Return a curve's last value up to a step."""
    steps, values = curves.get(name, (np.zeros(0), np.zeros(0)))
    return float(values[np.flatnonzero(steps <= step)[-1]]) if (steps <= step).any() else otherwise


def _last(curves: dict[str, Series], name: str) -> float:
    if name not in curves:
        return math.nan
    rounds, values = curves[name]
    trained = values[rounds > 0]
    return float(trained[-_LAST:].mean()) if len(trained) else math.nan


def _at(curves: dict[str, Series], name: str, index: int) -> float:
    return float(curves[name][1][index]) if name in curves else math.nan


def _seconds(curves: dict[str, Series]) -> float:
    if "seconds/clients" not in curves:
        return math.nan
    whole = curves["seconds/clients"][1] + curves["seconds/aggregation"][1]
    return float(np.median(whole[1:] if len(whole) > 1 else whole))  # the first fills caches
