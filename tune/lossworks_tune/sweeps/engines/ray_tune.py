"""``engine=ray``: every configuration a trial of Ray Tune, in a process of its own, trained by its room."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from lossworks.errors import LossworksError, RunError, UserError
from lossworks.tracking import Journal, usable_cpus
from lossworks.trainables import Trainable
from lossworks_tune.cluster import WAITING_CPUS, cluster, room
from lossworks_tune.sweeps.engines.ray_source import Source, SparingScheduler
from lossworks_tune.sweeps.engines.scheduling import build_scheduler
from lossworks_tune.sweeps.engines.stopping import Leader
from lossworks_tune.sweeps.ledger import Configuration, End, Trial, TrialsFolder
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.space import Space
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.sweep import Sweep


class RaySweep:
    """Runs a sweep on a Ray cluster, or goes on with one; trials that had begun go on from their checkpoints.

    Args:
        sweep: The sweep; its folder is on storage that all nodes share.
        address: A cluster to join; without it the one that runs here, or a new one.
    """

    def __init__(self, sweep: Sweep, address: str | None = None) -> None:
        self._sweep, self._spec, self._address = sweep, sweep.spec, address
        self.doing = ""

    def run(self) -> None:
        """Train all configurations to their ends.

        Raises:
            UserError: The cluster is too small, or an objective is not reported.
            RunError: Ray Tune failed.
        """
        sweep = self._sweep
        waiting = [folder.configuration for folder in sweep.trials.begun() if folder.end is None]
        proposals = Proposals(self._spec, sweep.space, list(sweep.trials.read()))
        source = Source(self._spec, sweep.trials, waiting, proposals)
        self._fit(source, build_scheduler(sweep), self._spec.seeds)

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds."""
        wanted = [trial.configuration for trial in trials]
        waiting = [one for one in wanted if self._sweep.confirmed.of(one.number).end is None]
        if waiting:
            whole = self._spec.model_copy(update={"wilcoxon": 0.0, "time_s": None})
            source = Source(whole, self._sweep.confirmed, waiting, None)
            self._fit(source, FIFOScheduler(), self._spec.confirm.seeds)

    def _fit(self, source: Source, scheduler: TrialScheduler, seeds: tuple[int, ...]) -> None:
        from ray import tune

        trainable = self._sweep.space.trainable
        cpus = trainable.cpus(self._sweep.training)
        with cluster(self._address) as free:
            at_once = room(self._spec.at_once, cpus, free)
            task = _Task(source.spec, self._sweep.path, source.trials.path, seeds)
            function = tune.with_resources(
                tune.with_parameters(_train, task=task),
                {"CPU": WAITING_CPUS if trainable.starts_workers else cpus},
            )
            tuner = tune.Tuner(
                function,
                tune_config=tune.TuneConfig(
                    search_alg=source,
                    scheduler=SparingScheduler(scheduler, partial(_release, trainable, source.trials)),
                    num_samples=-1,
                    max_concurrent_trials=at_once,
                    trial_dirname_creator=_short_name,
                ),
                run_config=tune.RunConfig(
                    name=f"attempt-{time.time_ns()}",
                    storage_path=str(self._sweep.path / "ray"),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=2),
                ),
            )
            try:
                tuner.fit()
            except tune.TuneError as error:
                raise RunError(f"engine=ray: {error}") from error
        if source.refusal:
            raise UserError(source.refusal)


@dataclass(frozen=True)
class _Task:
    """What a trial's process is told.

    Attributes:
        spec: The sweep.
        path: Folder of its run.
        trials: That of the trials.
        seeds: On which each configuration is trained.
    """

    spec: SweepSpec
    path: Path
    trials: Path
    seeds: tuple[int, ...]


def _train(config: dict[str, Any], task: _Task) -> None:
    """Train one configuration on all seeds, one after the other; what goes wrong is kept, not raised."""
    sweep = Sweep(task.spec, task.spec.make_space(), task.path)
    trials = TrialsFolder(task.trials, sweep.steps)
    configuration = Configuration(**config["configuration"])
    folder = trials.of(configuration.number)
    trial = Trial.read(folder, sweep.steps)
    try:
        with Journal.open(folder.journal) as journal:
            end = _TrialTraining(sweep, task.seeds, trial, journal).run(folder.path, trials)
    except LossworksError as error:
        end = End("failed", str(error), trial.rows[-1]["step"] if trial.rows else 0)
    folder.finish(end)


class _TrialTraining:
    """The trainings of one configuration, from where an earlier process left them.

    Args:
        sweep: The sweep.
        seeds: On which it is trained.
        trial: What it has reported so far.
        journal: Takes what it reports.
    """

    def __init__(self, sweep: Sweep, seeds: tuple[int, ...], trial: Trial, journal: Journal) -> None:
        self._sweep, self._seeds, self._journal = sweep, seeds, journal
        self._fields = trial.configuration.fields
        self._finals = list(trial.finals)
        self._seen = trial.rows[-1]["step"] if trial.rows else 0

    def run(self, path: Path, trials: TrialsFolder) -> End:
        """Train on all seeds and return how it ended.

        Raises:
            LossworksError: A training failed, or an objective is not reported.
        """
        space, steps = self._sweep.space, self._sweep.steps
        for place, seed in enumerate(self._seeds):
            training = space.training(self._fields, seed)
            space.trainable.train(training, path / f"seed-{seed}", partial(self._keep, place))
            left = len(self._finals) < len(self._seeds)
            if left and Leader.among(self._sweep.spec, trials.read()).beats(self._finals):
                return End("stopped", "worse than the leader on the same seeds", len(self._finals) * steps)
        return End("finished", "", len(self._seeds) * steps)

    def _keep(self, place: int, step: int, metrics: dict[str, float]) -> None:
        """Keep what a seed's training reports, and tell Ray Tune the objectives' means so far."""
        from ray import tune

        means = self._sweep.spec.means([*self._finals[:place], metrics])
        at = place * self._sweep.steps + step
        if at > self._seen:  # after a restart, earlier ones are reported again
            self._journal.write(at, metrics)
        tune.report(means)
        if step == self._sweep.steps and place >= len(self._finals):
            self._finals.append(metrics)


def _release(trainable: Trainable, trials: TrialsFolder, configuration: Configuration) -> None:
    """Give back what a trial's trainings hold of the cluster."""
    trainable.release(trials.of(configuration.number).path)


def _short_name(trial: RayTrial) -> str:
    return f"trial-{trial.config['configuration']['number']:05d}-{trial.trial_id}"


def require_local_room(spec: SweepSpec, space: Space) -> None:
    """Check that trials have room on this machine, before anything is started.

    Raises:
        UserError: They have not.
    """
    training = space.training(space.anchors()[0][1], spec.seeds[0])
    room(spec.at_once, space.trainable.cpus(training), usable_cpus())
