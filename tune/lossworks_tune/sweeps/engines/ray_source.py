"""What Ray Tune asks for: the sweep's configurations one by one, and which of them may be stopped."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from lossworks_tune.sweeps.ledger import Configuration, End, TrialsFolder
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.spec import SweepSpec

_LEAVING_S = 10.0
"""How long the processes of a trial that was stopped may take to end."""


class Source(Searcher):
    """Gives Ray Tune the sweep's configurations, and keeps how they ended.

    Args:
        spec: The sweep.
        trials: The trials' folder.
        waiting: Configurations to begin first, whose trials had begun before.
        proposals: Further ones, if any.
    """

    def __init__(
        self,
        spec: SweepSpec,
        trials: TrialsFolder,
        waiting: Sequence[Configuration],
        proposals: Proposals | None,
    ) -> None:
        super().__init__(metric=next(iter(spec.objectives)), mode=next(iter(spec.objectives.values())))
        self.spec, self.trials, self.refusal = spec, trials, ""
        self._waiting, self._proposals = list(waiting), proposals
        self._begun: dict[str, Configuration] = {}
        self._started = time.monotonic()

    def suggest(self, trial_id: str) -> Any:
        """Return the next configuration, or that there are no more."""
        if trial_id not in self._begun:
            configuration = self._next()
            if configuration is None:
                return Searcher.FINISHED
            self.trials.of(configuration.number).begin(configuration)
            self._begun[trial_id] = configuration
        return {"configuration": asdict(self._begun[trial_id])}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Keep how a trial ended, if it was not itself that did."""
        configuration = self._begun[trial_id]
        folder = self.trials.of(configuration.number)
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


class SparingScheduler(FIFOScheduler):
    """Asks a scheduler about all trials but anchors, which come to their end.

    Args:
        inner: The scheduler.
        release: Gives back what a trial holds of the cluster whose process was ended from outside.
    """

    def __init__(self, inner: TrialScheduler, release: Callable[[Configuration], None]) -> None:
        super().__init__()
        self._inner, self._release = inner, release
        self._leaving: list[tuple[RayTrial, float]] = []

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
        self._leaving.append((trial, time.monotonic()))
        if not _is_anchor(trial):
            self._inner.on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """See ``TrialScheduler``."""
        if _is_anchor(trial):
            return str(TrialScheduler.CONTINUE)
        decision = str(self._inner.on_trial_result(tune_controller, trial, result))
        if decision != TrialScheduler.CONTINUE:
            self._leaving.append((trial, time.monotonic()))
        return decision

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
        self._release_left()
        waiting = (t for t in tune_controller.get_trials() if t.status == RayTrial.PENDING and _is_anchor(t))
        found = next(waiting, None)
        return found or self._inner.choose_trial_to_run(tune_controller)

    def _release_left(self) -> None:
        """Give back what trials hold that were stopped or paused; Ray ends their processes meanwhile."""
        now = time.monotonic()
        for trial, _ in self._leaving:
            if trial.status != RayTrial.RUNNING:
                self._release(Configuration(**trial.config["configuration"]))
        self._leaving = [(trial, since) for trial, since in self._leaving if now - since < _LEAVING_S]


def _is_anchor(trial: RayTrial) -> bool:
    return bool(trial.config.get("configuration", {}).get("anchor"))
