"""Trials as points of the searched space, and how much each of its dimensions decides: fANOVA's shares."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lossworks.reporting.series import series
from lossworks.trainables import Direction
from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.ledger import Configuration, Trial, shown
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.space import LOSS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from optuna.distributions import BaseDistribution

LEAST = 8  # trials; a forest of fewer says nothing
_ROUGH = 20  # trials; what fewer say is called rough
_MOST = 250  # trials; the time grows with their square
_ALL = "all losses"


@dataclass(frozen=True)
class Mark:
    """A trial as a point.

    Attributes:
        trial: The trial.
        kind: Stopped early; drawn by the search and finished; an anchor that finished.
        values: What it has of each dimension; an anchor's are those of the spec that it trains.
        objective: The first one; of one that was stopped, its last value.
        deviation: Standard deviation over seeds, 0 for one seed.
    """

    trial: Trial
    kind: Literal["stopped", "drawn", "anchor"]
    values: dict[str, Any]
    objective: float
    deviation: float = 0.0


def marks_of(results: Results) -> Iterator[Mark]:
    """Yield finished trials, the best first, then those stopped early."""
    metric = results.metrics[0]
    for trial in results.ranked:
        values = _values(results, trial.configuration)
        seeds = trial.seeds_values(metric)
        deviation = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        kind: Literal["drawn", "anchor"] = "anchor" if trial.configuration.anchor else "drawn"
        yield Mark(trial, kind, values, trial.value(metric), deviation)
    for trial in results.trials:
        points = series(trial.rows, metric)
        if trial.status == "stopped" and points is not None:
            values = _values(results, trial.configuration)
            yield Mark(trial, "stopped", values, float(points[1][-1]))


def _values(results: Results, configuration: Configuration) -> dict[str, Any]:
    spec = results.space.training(configuration.fields, 0) if configuration.anchor else None
    own = f"{configuration.loss}."
    found = {}
    for name, dimension in results.dimensions.items():
        field = f"loss.{name.removeprefix(own)}" if name.startswith(own) else name
        field = "loss.name" if name == LOSS else field
        value = configuration.fields.get(field, _at(spec, field))
        if dimension.choice is not None:
            known = label(value) in map(label, dimension.choice)
        else:
            known = isinstance(value, int | float) and not (dimension.logarithmic and value <= 0)
        if known:
            found[name] = value
    return found


def _at(spec: Any, field: str) -> Any:
    for name in field.split("."):
        spec = getattr(spec, name, None)
    return spec


def share(dimension: DimensionSpec, value: Any) -> float:
    """Return where a value lies in a dimension, on its scale: 0 at the least, 1 at the largest."""
    if dimension.choice is not None:
        labels = [label(choice) for choice in dimension.choice]
        return labels.index(label(value)) / (len(labels) - 1) if len(labels) > 1 else 0.5
    low, high = map(float, dimension.range)
    if dimension.logarithmic:
        return math.log(value / low) / math.log(high / low)
    return (float(value) - low) / (high - low)


def ticks(dimension: DimensionSpec) -> dict[str, float]:
    """Return values of a dimension in words, and where they lie."""
    values = list(dimension.choice or ())
    if dimension.choice is None:
        low, high = map(float, dimension.range)
        values = [low + at / 4 * (high - low) for at in range(5)]
        if dimension.logarithmic:
            values = [low * (high / low) ** (at / 4) for at in range(5)]
        values = [round(value) for value in values] if dimension.whole else values
    return {label(value): share(dimension, value) for value in values}


def label(value: Any) -> str:
    """Return a value as axes have it; a list and a tuple of the same are the same."""
    return shown(list(value) if isinstance(value, tuple) else value)


def position(dimension: DimensionSpec, value: Any, trial: Trial) -> float:
    """Return where a value lies on the axis of :func:`set_scale`."""
    if dimension.choice is None:
        return float(value)
    return share(dimension, value) * (len(dimension.choice) - 1) + 0.5 * _jitter(trial)


def height(dimension: DimensionSpec, value: Any, trial: Trial) -> float:
    """Return where a value lies on a rail from 0 to 1; values of anchors may lie outside."""
    shift = 0.4 * _jitter(trial) / max(len(dimension.choice), 4) if dimension.choice else 0.0
    return min(max(share(dimension, value) + shift, -0.05), 1.05)


def _jitter(trial: Trial) -> float:
    """Return from −0.5 to 0.5 by how much a trial is beside others of its category, always the same."""
    return (trial.configuration.number * 0.618034) % 1 - 0.5  # the golden ratio leaves no two side by side


def span(values: Sequence[float], mode: Direction) -> tuple[float, float]:
    """Return the least and the largest value, but for those far worse than most.

    Far is three interquartile ranges beyond a quartile: a few diverged trainings would hide how the others
    differ.
    """
    lower, upper = np.quantile(values, [0.25, 0.75])
    reach = 3 * (upper - lower) or math.inf
    near = [v for v in values if (v >= lower - reach if mode == "max" else v <= upper + reach)]
    return min(near), max(near)


def padded(limits: tuple[float, float]) -> tuple[float, float]:
    """Return limits with some room at both ends."""
    room = 0.06 * (limits[1] - limits[0]) or 0.01 * abs(limits[0]) or 1.0
    return limits[0] - room, limits[1] + room


def head(figure: "Figure", results: Results, text: str, beyond: int = 0) -> None:
    """Give a figure its title, which says how many trials are beyond its :func:`span`."""
    text = f"{results.spec.name}: {text}{f' ({beyond} far worse, at the edge)' if beyond else ''}"
    figure.suptitle(text, fontsize=19, fontweight="bold", x=0.02, ha="left")


def palette(results: Results) -> dict[str, Any]:
    """Return the colour of each loss, the same in all pictures."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(trial.configuration.loss for trial in results.trials))
    if len(names) > 20:
        return dict(zip(names, colormaps["turbo"](np.linspace(0, 1, len(names))), strict=True))
    colours = colormaps["tab10" if len(names) <= 10 else "tab20"]
    return {name: colours(index) for index, name in enumerate(names)}


def set_scale(axes: "Axes", dimension: DimensionSpec) -> None:
    """Make the x axis of a small panel that of a dimension."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    if dimension.choice is not None:
        names = [label(choice) for choice in dimension.choice]
        turned = 0 if sum(map(len, names)) <= 32 else 35 if len(names) <= 8 else 90
        sides: dict[str, Any] = {"ha": "right", "rotation_mode": "anchor"} if turned else {}
        size = min(12.0, 320 / len(names))
        axes.set_xticks(range(len(names)), names, rotation=turned, fontsize=size, **sides)
        axes.set_xlim(-0.6, len(names) - 0.4)
        return
    low, high = dimension.range
    axes.update_datalim([(low, 0), (high, 0)], updatey=False)  # all that was searched
    if dimension.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,), numticks=6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=dimension.whole))


def importances(results: Results, trials: Sequence[Trial], names: Sequence[str]) -> dict[str, float]:
    """Return each dimension's own share of the variance between trials, the largest first.

    Functional ANOVA of Optuna's random forest, averaged over the searched ranges, on the scales that they
    are searched on. What the shares lack to 1 is due to interactions. Empty if all trials are alike.

    Args:
        results: Of the sweep; its first objective is explained.
        trials: Finished, none of them an anchor, the best first; every so many-th of more than 250.
        names: Of dimensions that all of them have.

    References:
        Hutter, Hoos and Leyton-Brown, An efficient approach for assessing hyperparameter importance, 2014.
    """
    import optuna
    from optuna.distributions import FloatDistribution
    from optuna.trial import create_trial

    metric, mode = next(iter(results.spec.objectives.items()))
    trials = trials[:: math.ceil(len(trials) / _MOST)]
    low, high = span([trial.value(metric) for trial in trials], mode)
    if low == high:
        return {}
    distributions: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in names}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study()
        for trial in trials:
            own = trial.configuration.parameters
            params = {name: _encoded(results.dimensions[name], own[name]) for name in names}
            value = min(max(trial.value(metric), low), high)  # diverged ones would be all that is explained
            study.add_trial(create_trial(params=params, distributions=distributions, value=value))
        found = optuna.importance.FanovaImportanceEvaluator(seed=0).evaluate(study, params=list(names))
        return {name: float(value) for name, value in found.items()}
    finally:
        optuna.logging.set_verbosity(verbosity)


def _encoded(dimension: DimensionSpec, value: Any) -> float:
    """Return where from 0 to 1 the forest finds a value.

    Optuna's own encodings serve worse. Of a logarithmic range it takes the linear length, by which nine
    tenths of 1e-4 … 1e-1 are the last decade. Of k choices it makes k columns and averages over all 2ᵏ
    combinations, most of them impossible, which takes minutes from a dozen losses on. Here each choice has
    1/k of the range.
    """
    found = min(max(share(dimension, value), 0.0), 1.0)
    count = len(dimension.choice or ())
    return (found * (count - 1) + 0.5) / count if count > 1 else found


def draw_importance(figure: "Figure", results: Results) -> bool:
    """Draw what decides over all losses, and within each; return whether there is anything to draw."""
    panels, left_out = _panels(results)
    shares = {title: importances(results, *panel) for title, panel in panels.items()}
    shares = {title: found for title, found in shares.items() if found}
    if not shares:
        return False
    rows = math.ceil(len(shares) / 3)
    columns = math.ceil(len(shares) / rows)
    most = max(len(found) for found in shares.values())
    figure.set_size_inches(18, 1.8 + rows * (1.6 + 0.5 * most))
    head(figure, results, f"what decides {results.metrics[0]} (fANOVA)")
    panes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, found) in zip(panes, shares.items(), strict=False):
        _draw_shares(axes, name, len(panels[name][0]), found, most)
    for axes in panes[len(shares) :]:
        axes.remove()
    if left_out:
        text = f"Left out, with fewer than {LEAST} finished trials: {', '.join(left_out)}"
        figure.supxlabel(textwrap.fill(text, 180), fontsize=12, x=0.02, ha="left")
    return True


def _panels(results: Results) -> tuple[dict[str, tuple[list[Trial], list[str]]], list[str]]:
    """Return trials and dimensions to explain, by title, and the losses that have too few trials."""
    space = results.space
    drawn = [trial for trial in results.ranked if not trial.configuration.anchor]
    panels, left_out = {}, []
    if LOSS in results.dimensions and len(drawn) >= LEAST:
        panels[_ALL] = (drawn, [LOSS, *space.general])
    for candidate in space.candidates:
        own = [trial for trial in drawn if trial.configuration.loss == candidate.slug]
        names = [*(f"{candidate.slug}.{name}" for name in candidate.searched), *space.general]
        if len(own) >= LEAST:
            panels[candidate.slug] = (own, names)
        elif names:
            left_out.append(f"{candidate.slug} ({len(own)})")
    # Of a single one there is nothing to compare: its share is 1.
    return {title: panel for title, panel in panels.items() if len(panel[1]) > 1}, left_out


def _draw_shares(axes: "Axes", title: str, count: int, found: dict[str, float], most: int) -> None:
    rough = ", rough" if count < _ROUGH else ""
    axes.set_title(f"{title}: {count} trials{rough}")
    names = [textwrap.fill(name.removeprefix(f"{title}."), 24) for name in found]
    bars = axes.barh(names, list(found.values()), height=0.6, color="#2563a8")
    axes.bar_label(bars, labels=[f"{value:.0%}" for value in found.values()], padding=5)
    axes.set_ylim(most - 0.4, -0.6)  # bars of one width in all panels
    axes.set(xlim=(0, 1.1), xlabel="share of the variance")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
