"""Ray Tune's schedulers, and what they call of its controller, for trials that live in this process."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from ray import tune
from ray.tune import schedulers
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.space import LOSS, Space
from lossworks_tune.sweeps.sweep import Sweep

if TYPE_CHECKING:
    from ray.tune.search.sample import Domain

TIME = "training_iteration"  # reports, counted from 1
_NEVER = 10**12


def build_scheduler(sweep: Sweep) -> TrialScheduler:
    """Return the scheduler that a sweep asks for."""
    spec, space, reports = sweep.spec, sweep.space, sweep.reports
    kind, (metric, mode) = spec.scheduler.kind, next(iter(spec.objectives.items()))
    common: dict[str, Any] = {"time_attr": TIME, "metric": metric, "mode": mode}
    grace = max(1, round((spec.scheduler.grace_steps or sweep.every) / sweep.every))
    if kind == "asha":
        return schedulers.AsyncHyperBandScheduler(
            **common,
            max_t=reports,
            grace_period=min(grace, reports),
            reduction_factor=spec.scheduler.reduction,
        )
    if kind == "hyperband":
        return schedulers.HyperBandScheduler(
            **common, max_t=reports, reduction_factor=spec.scheduler.reduction
        )
    if kind == "median":
        # It would pause trials to compare with others; these go on at once instead.
        return schedulers.MedianStoppingRule(**common, grace_period=grace, min_time_slice=_NEVER)
    if spec.scheduler.of_populations:
        common |= {"perturbation_interval": grace, "log_config": False, "synch": True}
        common["custom_explore_fn"] = _Clip(space.dimensions)
    if kind == "pbt":
        return schedulers.PopulationBasedTraining(**common, hyperparam_mutations=_mutations(space))
    if kind == "pb2":
        from ray.tune.schedulers.pb2 import PB2

        return PB2(**common, hyperparam_bounds=_bounds(space))
    return schedulers.FIFOScheduler()


def _mutations(space: Space) -> "dict[str, Domain | list[Any]]":
    """Return what population-based training may change: everything but the loss itself."""
    return {name: _domain(of) for name, of in space.dimensions.items() if name != LOSS}


def _bounds(space: Space) -> dict[str, list[float]]:
    """Return the ranges of all numbers, which alone a Gaussian process can choose."""
    return {name: list(of.range) for name, of in space.dimensions.items() if of.choice is None}


def _domain(dimension: DimensionSpec) -> "Domain | list[Any]":
    if dimension.choice is not None:
        return list(dimension.choice)
    low, high = dimension.range
    if dimension.whole:
        return (tune.lograndint if dimension.logarithmic else tune.randint)(int(low), int(high) + 1)
    return (tune.loguniform if dimension.logarithmic else tune.uniform)(low, high)


class _Clip:
    """Brings changed numbers back into their ranges.

    Args:
        dimensions: By name.
    """

    def __init__(self, dimensions: dict[str, DimensionSpec]) -> None:
        self._dimensions = dimensions

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        for name, dimension in self._dimensions.items():
            if dimension.choice is None and name in config:
                low, high = dimension.range
                value = min(max(config[name], low), high)
                config[name] = round(value) if dimension.whole else value
        return config


class Controller:
    """What Ray Tune's schedulers ask of its controller, for trials of a pack.

    The schedulers are Ray's own, but a trial of theirs is an actor; here it is a row of tensors, so stopping
    and pausing are notes that :class:`lossworks_tune.sweeps.engines.packed.PackedSweep` acts on.

    Args:
        scheduler: Whose decisions these are.
        seed: Of the scheduler's random numbers, which it takes from global streams.
    """

    search_alg = None

    def __init__(self, scheduler: TrialScheduler, seed: int) -> None:
        self.scheduler = scheduler
        self._draws = type(scheduler) is not FIFOScheduler
        self.stopped: list[RayTrial] = []
        self.taken_over: list[tuple[RayTrial, str]] = []
        self._trials: list[RayTrial] = []
        self._streams = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()  # noqa: S311

    def add(self, name: str, config: dict[str, Any]) -> RayTrial:
        """Return a new trial that runs."""
        trial = RayTrial("lossworks", stub=True, config=dict(config), trial_id=name)
        self._trials.append(trial)
        with self._own_streams():
            self.scheduler.on_trial_add(self, trial)
        trial.set_status(RayTrial.RUNNING)
        return trial

    def decide(self, trial: RayTrial, result: dict[str, Any]) -> str:
        """Return the scheduler's decision on a result: CONTINUE, STOP, PAUSE or NOOP."""
        with self._own_streams():
            decision: str = self.scheduler.on_trial_result(self, trial, result)
        if decision == TrialScheduler.PAUSE:
            trial.set_status(RayTrial.PAUSED)
        return decision

    def end(self, trial: RayTrial, result: dict[str, Any], *, failed: bool = False) -> None:
        """Tell the scheduler that a trial has come to its end."""
        if trial.is_finished():
            return
        trial.set_status(RayTrial.ERROR if failed else RayTrial.TERMINATED)
        with self._own_streams():
            if failed:
                self.scheduler.on_trial_error(self, trial)
            else:
                self.scheduler.on_trial_complete(self, trial, result)

    def unpaused(self) -> list[RayTrial]:
        """Return trials that were paused and run again."""
        found = []
        while (trial := self.scheduler.choose_trial_to_run(self)) is not None and trial not in found:
            trial.set_status(RayTrial.RUNNING)
            found.append(trial)
        return found

    def get_trials(self) -> list[RayTrial]:
        """Return all trials."""
        return list(self._trials)

    def get_live_trials(self) -> list[RayTrial]:
        """Return those that have not ended."""
        return [trial for trial in self._trials if not trial.is_finished()]

    def stop_trial(self, trial: RayTrial) -> None:
        """Note that a paused trial is stopped."""
        trial.set_status(RayTrial.TERMINATED)
        self.stopped.append(trial)
        self.scheduler.on_trial_remove(self, trial)

    def pause_trial(self, trial: RayTrial, should_checkpoint: bool = True) -> None:
        """Do nothing: who takes over another's parameters need not stop for it."""

    def _schedule_trial_save(self, trial: RayTrial, result: dict[str, Any] | None = None) -> str:
        """Return what stands for a trial's checkpoint: its name."""
        del result
        return str(trial.trial_id)

    @contextmanager
    def _own_streams(self) -> Iterator[None]:
        """Give the scheduler random streams of its own, and the process its own back."""
        if not self._draws:
            yield
            return
        before = random.getstate(), np.random.get_state()
        random.setstate(self._streams[0])
        np.random.set_state(self._streams[1])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a scheduler's own fits complain of helps nobody
                yield
        finally:
            self._streams = random.getstate(), np.random.get_state()
            random.setstate(before[0])
            np.random.set_state(before[1])


def source_of(trial: RayTrial) -> str | None:
    """Return the name of the trial whose parameters a trial is to take over, once; None for none."""
    manager = trial.run_metadata.checkpoint_manager
    found = manager._latest_checkpoint_result
    manager._latest_checkpoint_result = None
    return None if found is None else str(found.checkpoint)
