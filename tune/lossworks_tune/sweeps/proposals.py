"""Which configurations a sweep begins, in order: anchors, then a grid's or what Optuna draws."""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from lossworks_tune.sweeps.ledger import Configuration, Trial
from lossworks_tune.sweeps.space import Space
from lossworks_tune.sweeps.spec import SweepSpec

if TYPE_CHECKING:
    import optuna
    from optuna.samplers import BaseSampler


class Proposals:
    """Gives configurations one by one, and learns how they did.

    The same sweep told the same results in the same order gives the same configurations.

    Args:
        spec: The sweep.
        space: What it searches.
        begun: Trials of an interrupted sweep whose order of ends isn't known: they are learned from as they
            stand, and configurations go on behind them.
    """

    def __init__(self, spec: SweepSpec, space: Space, begun: list[Trial] | None = None) -> None:
        self._spec, self._space = spec, space
        self._anchors = space.anchors()
        # A list and no generator, which could not travel to another process.
        self._grid = list(space.grid(spec.search.points)) if spec.search.kind == "grid" else None
        self._number = 0
        self._asked: dict[int, optuna.Trial] = {}
        self._study = _study(spec, len(begun or ()))
        if begun:
            self._go_on_behind(begun)

    def next(self) -> Configuration | None:
        """Return the next configuration, or None behind the last."""
        number = self._number
        found = self._anchor(number) if number < len(self._anchors) else self._drawn(number)
        if found is not None:
            self._number += 1
        return found

    def tell(self, number: int, values: list[float] | None, *, whole: bool, step: int = 0) -> None:
        """Learn how a configuration did.

        Args:
            number: Its number.
            values: Of the objectives; None if it failed.
            whole: Whether it came to its end, or was stopped early.
            step: Where it was stopped.
        """
        from optuna.trial import TrialState

        trial = self._asked.pop(number, None)
        if trial is None:
            return  # an anchor, or of a grid
        if values is None or not all(map(math.isfinite, values)):
            self._study.tell(trial, state=TrialState.FAIL)
        elif whole or len(values) > 1:
            self._study.tell(trial, values)
        else:
            trial.report(values[0], step)
            self._study.tell(trial, state=TrialState.PRUNED)

    def _anchor(self, number: int) -> Configuration:
        title, fields = self._anchors[number]
        return Configuration(number, fields, {}, title)

    def _drawn(self, number: int) -> Configuration | None:
        if self._grid is not None:
            place = number - len(self._anchors)
            if place >= len(self._grid):
                return None
            parameters = self._grid[place]
            return Configuration(number, self._space.fields(parameters), dict(parameters))
        if number >= len(self._anchors) + self._spec.trials:
            return None
        trial = self._study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of choices that no database could store; there is none
            self._space.draw(trial)
        self._asked[number] = trial
        return Configuration(number, self._space.fields(trial.params), dict(trial.params))

    def _go_on_behind(self, begun: list[Trial]) -> None:
        from optuna.trial import create_trial

        self._number = len(begun)
        if self._grid is not None:
            return
        for trial in begun:
            values = [trial.value(metric) for metric in self._spec.objectives]
            parameters = trial.configuration.parameters
            if parameters and trial.status == "finished" and all(map(math.isfinite, values)):
                asked = _Recorder(parameters)
                self._space.draw(asked)  # type: ignore[arg-type]
                self._study.add_trial(
                    create_trial(params=parameters, distributions=asked.distributions, values=values)
                )


class _Recorder:
    """Stands in for an Optuna trial, to learn the distributions of known parameters."""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self._parameters = parameters
        self.distributions: dict[str, Any] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        from optuna.distributions import CategoricalDistribution

        self.distributions[name] = CategoricalDistribution(choices)
        return self._parameters[name]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> Any:
        from optuna.distributions import FloatDistribution

        self.distributions[name] = FloatDistribution(low, high, log=log)
        return self._parameters[name]

    def suggest_int(self, name: str, low: int, high: int, *, log: bool) -> Any:
        from optuna.distributions import IntDistribution

        self.distributions[name] = IntDistribution(low, high, log=log)
        return self._parameters[name]


def _study(spec: SweepSpec, begun: int) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
    return optuna.create_study(
        directions=[directions[mode] for mode in spec.objectives.values()],
        sampler=_sampler(spec, spec.seed + 7919 * begun),
    )


def _sampler(spec: SweepSpec, seed: int) -> "BaseSampler":
    from optuna import samplers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are called experimental
        if spec.search.kind == "tpe":
            return samplers.TPESampler(
                seed=seed,
                n_startup_trials=spec.search.startup,
                multivariate=True,
                group=True,  # of what is searched under one loss
                constant_liar=True,
            )
        if spec.search.kind == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        return samplers.RandomSampler(seed=seed)
