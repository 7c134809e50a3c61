"""``engine=ray``: every configuration a trial of Ray Tune, in a process of its own, trained by its room."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lossworks.errors import LossworksError, RunError, UserError
from lossworks.home import ray_variables
from lossworks.tracking import Journal
from lossworks_tune.ledger import Configuration, End, Trial, folder_of, folders
from lossworks_tune.proposals import Proposals
from lossworks_tune.results import CONFIRMED, TRIALS, steps_of
from lossworks_tune.scheduling import build_scheduler
from lossworks_tune.space import Space
from lossworks_tune.specs import SweepSpec
from lossworks_tune.stopping import Leader, require_reported

_WAITING_CPUS = 0.01  # of a process that waits for the workers it has started; Ray takes no 0
ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # our own display shows the trials
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in specs are from where the command was called
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class RaySweep:
    """Runs a sweep on a Ray cluster, or goes on with one; trials that had begun go on from their checkpoints.

    Args:
        spec: The sweep.
        space: What it searches.
        path: Folder of the run, on storage that all nodes share.
        address: A cluster to join; without it the one that runs here, or a new one.
    """

    def __init__(self, spec: SweepSpec, space: Space, path: Path, address: str | None = None) -> None:
        self._spec, self._space, self._path, self._address = spec, space, path, address
        self._training = space.training(space.anchors()[0][1], spec.seeds[0])

    def run(self) -> None:
        """Train all configurations to their ends.

        Raises:
            UserError: The cluster is too small, or an objective is not reported.
            RunError: Ray Tune failed.
        """
        steps, past = steps_of(self._space), list(folders(self._path / TRIALS))
        begun = [Trial.read(folder, steps) for folder in past]
        waiting = [folder.configuration for folder in past if folder.end is None]
        proposals = Proposals(self._spec, self._space, begun)
        every = getattr(getattr(self._training, "evaluation", None), "every", 1)
        reports = len(self._spec.seeds) * -(-steps // every)
        scheduler = build_scheduler(self._spec, self._space, reports, every)
        self._fit(_Source(self._spec, self._path / TRIALS, waiting, proposals), scheduler, self._spec.seeds)

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds."""
        path = self._path / CONFIRMED
        wanted = [trial.configuration for trial in trials]
        waiting = [one for one in wanted if folder_of(path, one.number).end is None]
        if waiting:
            whole = self._spec.model_copy(update={"wilcoxon": 0.0, "time_s": None})
            source = _Source(whole, path, waiting, None)
            self._fit(source, FIFOScheduler(), self._spec.confirm.seeds)

    def _fit(self, source: "_Source", scheduler: TrialScheduler, seeds: tuple[int, ...]) -> None:
        from ray import tune

        trainable = self._space.trainable
        cpus = trainable.cpus(self._training)
        with _cluster(self._address) as free:
            at_once = _at_once(self._spec, cpus, free)
            task = _Task(source.spec.model_dump(mode="json"), str(source.path), seeds)
            function = tune.with_resources(
                tune.with_parameters(_train, task=task),
                {"CPU": _WAITING_CPUS if trainable.starts_workers else cpus},
            )
            tuner = tune.Tuner(
                function,
                tune_config=tune.TuneConfig(
                    search_alg=source,
                    scheduler=_Sparing(scheduler),
                    num_samples=-1,
                    max_concurrent_trials=at_once,
                    trial_dirname_creator=_short_name,
                ),
                run_config=tune.RunConfig(
                    name=f"attempt-{time.time_ns()}",
                    storage_path=str(self._path / "ray"),
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
    """What a trial's process is told: the sweep as plain data, the trials' folder, the seeds."""

    spec: dict[str, Any]
    path: str
    seeds: tuple[int, ...]


def _train(config: dict[str, Any], task: _Task) -> None:
    """Train one configuration on all seeds, one after the other; what goes wrong is kept, not raised."""
    from ray import tune

    spec = SweepSpec.parse(task.spec)
    space = Space(spec)
    configuration = Configuration(**config["configuration"])
    folder = folder_of(Path(task.path), configuration.number)
    steps = steps_of(space)
    trial = Trial.read(folder, steps)
    finals = list(trial.finals)
    seen = trial.rows[-1]["step"] if trial.rows else 0

    def keep(place: int, step: int, metrics: dict[str, float]) -> None:
        at = place * steps + step
        require_reported(spec, metrics)
        if at > seen:  # after a restart, earlier ones are reported again
            journal.write(at, metrics)
        so_far = [*finals[:place], metrics]
        values = {m: sum(one[m] for one in so_far) / len(so_far) for m in spec.objectives}
        tune.report(values)
        if step == steps and place >= len(finals):
            finals.append(metrics)

    try:
        with Journal.open(folder.journal) as journal:
            for place, seed in enumerate(task.seeds):
                training = space.training(configuration.fields, seed)
                space.trainable.train(training, folder.path / f"seed-{seed}", partial(keep, place))
                if len(finals) < len(task.seeds) and _leader(spec, Path(task.path), steps).beats(finals):
                    end = End("stopped", "worse than the leader on the same seeds", len(finals) * steps)
                    folder.finish(end)
                    return
        folder.finish(End("finished", "", len(task.seeds) * steps))
    except LossworksError as error:
        folder.finish(End("failed", str(error), seen))


def _leader(spec: SweepSpec, path: Path, steps: int) -> Leader:
    leader = Leader(spec)
    for folder in folders(path):
        trial = Trial.read(folder, steps)
        if trial.status == "finished":
            leader.learn(trial.finals)
    return leader


class _Source(Searcher):
    """Gives Ray Tune the sweep's configurations, and keeps how they ended.

    Args:
        spec: The sweep.
        path: The trials' folder.
        waiting: Configurations to begin first, whose trials had begun before.
        proposals: Further ones, if any.
    """

    def __init__(
        self, spec: SweepSpec, path: Path, waiting: Sequence[Configuration], proposals: Proposals | None
    ) -> None:
        super().__init__(metric=next(iter(spec.objectives)), mode=next(iter(spec.objectives.values())))
        self.spec, self.path, self.refusal = spec, path, ""
        self._waiting, self._proposals = list(waiting), proposals
        self._begun: dict[str, Configuration] = {}
        self._started = time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or that there are no more."""
        if trial_id not in self._begun:
            configuration = self._next()
            if configuration is None:
                return Searcher.FINISHED
            folder_of(self.path, configuration.number).begin(configuration)
            self._begun[trial_id] = configuration
        return {"configuration": asdict(self._begun[trial_id])}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Keep how a trial ended, if it was not itself that did."""
        configuration = self._begun[trial_id]
        folder = folder_of(self.path, configuration.number)
        end = folder.end
        if end is None:
            rows = folder.rows()
            step = rows[-1]["step"] if rows else 0
            why = "its process was lost" if error else f"by {self.spec.scheduler.kind}"
            end = End("failed" if error else "stopped", why, step)
            folder.finish(end)
        if end.reason.startswith("objectives="):
            self.refusal = end.reason
        if self._proposals is not None:
            values = [(result or {}).get(metric) for metric in self.spec.objectives]
            known = [float(value) for value in values if value is not None]
            usable = known if len(known) == len(values) and end.status != "failed" else None
            whole = end.status == "finished"
            self._proposals.tell(configuration.number, usable, whole=whole, step=end.step)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the trials' folders say all that going on needs."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing; see ``save``."""

    def _next(self) -> Configuration | None:
        late = self.spec.time_s is not None and time.monotonic() - self._started > self.spec.time_s
        if self.refusal or (late and not self._waiting):
            return None
        if self._waiting:
            return self._waiting.pop(0)
        return None if self._proposals is None else self._proposals.next()


class _Sparing(FIFOScheduler):
    """Asks a scheduler about all trials but anchors, which come to their end.

    Args:
        inner: The scheduler.
    """

    def __init__(self, inner: TrialScheduler) -> None:
        super().__init__()
        self._inner = inner

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Keep what the scheduler was made with."""
        del metric, mode, spec
        return True

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """See ``TrialScheduler``."""
        if not _is_anchor(trial):
            self._inner.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: RayTrial) -> None:
        """See ``TrialScheduler``."""
        if not _is_anchor(trial):
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """See ``TrialScheduler``."""
        if _is_anchor(trial):
            return str(TrialScheduler.CONTINUE)
        return str(self._inner.on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> None:
        """See ``TrialScheduler``."""
        if not _is_anchor(trial):
            self._inner.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: RayTrial) -> None:
        """See ``TrialScheduler``."""
        if not _is_anchor(trial):
            self._inner.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """Return an anchor that waits, or what the scheduler chooses."""
        waiting = (t for t in tune_controller.get_trials() if t.status == RayTrial.PENDING and _is_anchor(t))
        found = next(waiting, None)
        return found or self._inner.choose_trial_to_run(tune_controller)


def _is_anchor(trial: RayTrial) -> bool:
    return bool(trial.config.get("configuration", {}).get("anchor"))


def _short_name(trial: RayTrial) -> str:
    return f"trial-{trial.config['configuration']['number']:05d}-{trial.trial_id}"


def require_local_room(spec: SweepSpec, space: Space) -> None:
    """Check that trials have room on this machine, before anything is started.

    Raises:
        UserError: They have not.
    """
    training = space.training(space.anchors()[0][1], spec.seeds[0])
    _at_once(spec, space.trainable.cpus(training), _usable_cpus())


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_once(spec: SweepSpec, cpus: float, free: float) -> int:
    """Return how many trials have room.

    Raises:
        UserError: Fewer than are asked for.
    """
    room = int(free // cpus)
    if room < (spec.at_once or 1):
        raise UserError(
            f"at_once={spec.at_once or 1}: trials of {cpus:g} CPUs each need "
            f"{cpus * (spec.at_once or 1):g}, but {free:g} are free; use fewer at once, or fewer workers in "
            "the base"
        )
    return spec.at_once or room


@contextmanager
def _cluster(address: str | None) -> Iterator[float]:
    """Connect to a Ray cluster, or start one here; give how many CPUs are free."""
    import ray

    if ray.is_initialized():
        yield ray.available_resources().get("CPU", 0.0)
        return
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    usable = _usable_cpus()
    alone = address is None and "RAY_ADDRESS" not in os.environ
    try:
        ray.init(
            address="local" if alone else address,
            # One more than there are, for the processes that wait for the workers they have started.
            num_cpus=usable + 1 if alone else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": ray_variables(ENVIRONMENT)},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--address {address}: no Ray cluster answers there: {lines[0]}") from None
    try:
        yield float(usable) if alone else ray.available_resources().get("CPU", 0.0)
    finally:
        ray.shutdown()
