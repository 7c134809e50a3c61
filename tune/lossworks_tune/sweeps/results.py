"""What a sweep found: trials ranked, the best ones on fresh seeds, and what further hyperparameters bring."""

import csv
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lossworks.metrics.intervals import MeanInterval
from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.ledger import Trial
from lossworks_tune.sweeps.space import Space
from lossworks_tune.sweeps.spec import SweepSpec


@dataclass(frozen=True, eq=False)
class Results:
    """What a sweep has found so far.

    Attributes:
        spec: The sweep.
        space: What it searches.
        steps: How many steps each training reports up to.
        trials: All that have begun, by number.
        confirmed: Those that were trained again, on ``spec.confirm.seeds``; same numbers, their own finals.
    """

    spec: SweepSpec
    space: Space
    steps: int
    trials: tuple[Trial, ...]
    confirmed: tuple[Trial, ...]

    @property
    def dimensions(self) -> dict[str, DimensionSpec]:
        """What is searched, by the searcher's name."""
        return self.space.dimensions

    @property
    def metrics(self) -> list[str]:
        """The objectives' metrics."""
        return list(self.spec.objectives)

    def better(self, metric: str, one: float, other: float) -> bool:
        """Return whether one value of a metric is better than another; anything is better than NaN."""
        if math.isnan(one) or math.isnan(other):
            return math.isnan(other) and not math.isnan(one)
        return one > other if self.spec.objectives[metric] == "max" else one < other

    @cached_property
    def ranked(self) -> list[Trial]:
        """Trials that came to the end of all seeds, the best in the first objective first."""
        metric = self.metrics[0]
        sign = -1 if self.spec.objectives[metric] == "max" else 1
        whole = [
            trial
            for trial in self.trials
            if trial.status == "finished" and all(math.isfinite(trial.value(m)) for m in self.metrics)
        ]
        return sorted(whole, key=lambda t: (sign * t.value(metric), t.configuration.number))

    @cached_property
    def front(self) -> list[Trial]:
        """The Pareto front of two objectives: trials that none beats in one without losing in the other."""
        return [trial for trial in self.ranked if not any(self._dominates(o, trial) for o in self.ranked)]

    @cached_property
    def baseline(self) -> Trial | None:
        """The trial to compare with: cross-entropy at its defaults if it is there, else the first loss."""
        anchors = [trial for trial in self.trials if trial.configuration.anchor.endswith(", defaults")]
        plain = [t for t in anchors if t.configuration.loss == "cross-entropy"]
        return next(iter([*plain, *anchors]), None)

    @property
    def rival(self) -> Trial | None:
        """The best of the baseline's loss, searched as long as the others: a fairer comparison than that."""
        loss = self.baseline.configuration.loss if self.baseline else None
        return next((trial for trial in self.ranked if trial.configuration.loss == loss), None)

    def neutral(self, loss: str) -> Trial | None:
        """Return the trial at which a loss equals its parent, if it has such a point."""
        own = [t for t in self.trials if t.configuration.anchor and t.configuration.loss == loss]
        return next((t for t in own if not t.configuration.anchor.endswith(", defaults")), None)

    def to_confirm(self) -> list[Trial]:
        """Return the trials to train on fresh seeds: the best, and what they are to be compared with."""
        top = self.spec.confirm.top
        if not top or not self.ranked:
            return []
        best = (self.front if len(self.metrics) == 2 else self.ranked)[:top]
        losses = dict.fromkeys(trial.configuration.loss for trial in best)
        others = [self.baseline, self.rival, *map(self.neutral, losses)]
        compared = [trial for trial in others if trial is not None and trial.status == "finished"]
        return list({trial.configuration.number: trial for trial in [*best, *compared]}.values())

    @cached_property
    def winner(self) -> Trial | None:
        """The best on fresh seeds; where none were asked for, the best of the search.

        None where every confirmation has failed: the search's seeds alone make no winner then. With two
        objectives, the best in the first.
        """
        metric = self.metrics[0]
        again = [trial for trial in self.confirmed if trial.status == "finished" and trial.finals]
        found = self.ranked[0] if self.ranked and not self.confirmed else None
        if again:
            found = again[0]
            for trial in again[1:]:
                if self.better(metric, trial.value(metric), found.value(metric)):
                    found = trial
        if found is None:
            return None
        return next(t for t in self.trials if t.configuration.number == found.configuration.number)

    def fresh(self, trial: Trial, metric: str) -> MeanInterval | None:
        """Return a metric's mean over fresh seeds."""
        return MeanInterval.of(self._fresh_values(trial, metric))

    def gain(self, trial: Trial, over: Trial, metric: str) -> MeanInterval | None:
        """Return by how much a trial is above another, seed by seed: on fresh seeds if both had those."""
        pairs = [self._fresh_values(one, metric) for one in (trial, over)]
        if not all(pairs):
            pairs = [one.seeds_values(metric) for one in (trial, over)]
        count = min(map(len, pairs))
        return MeanInterval.of([a - b for a, b in zip(pairs[0][:count], pairs[1][:count], strict=True)])

    def write_csv(self, path: Path) -> None:
        """Write one line a trial: how it ended, its means, and what it trained."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.configuration.fields))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            fresh = [f"{metric} on fresh seeds" for metric in self.metrics]
            writer.writerow(["trial", "status", "seeds", *self.metrics, *fresh, *names, "anchor", "reason"])
            for trial in self.trials:
                means = [f"{trial.value(metric):.6g}" for metric in self.metrics]
                again = [self.fresh(trial, metric) for metric in self.metrics]
                own = trial.configuration
                writer.writerow(
                    [
                        *(own.number, trial.status, len(trial.finals), *means),
                        *("" if one is None else f"{one.value:.6g}" for one in again),
                        *(own.fields.get(name, "") for name in names),
                        *(own.anchor, trial.reason),
                    ]
                )

    def _fresh_values(self, trial: Trial, metric: str) -> list[float]:
        again = self.again(trial)
        # A configuration that failed on one seed has failed: the mean of the others flatters it.
        return again.seeds_values(metric) if again is not None and again.status == "finished" else []

    def again(self, trial: Trial) -> Trial | None:
        """Return what became of a trial on fresh seeds, or None if it was not trained on them."""
        number = trial.configuration.number
        return next((t for t in self.confirmed if t.configuration.number == number), None)

    def _dominates(self, one: Trial, other: Trial) -> bool:
        pairs = [(metric, one.value(metric), other.value(metric)) for metric in self.metrics]
        worse = any(self.better(metric, theirs, ours) for metric, ours, theirs in pairs)
        return not worse and any(self.better(metric, ours, theirs) for metric, ours, theirs in pairs)
