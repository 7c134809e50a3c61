"""``sweep(spec)``: configurations trained, ranked, confirmed on fresh seeds, drawn, and kept in MLflow."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from lossworks.errors import RunError, UserError
from lossworks.files import write_atomically
from lossworks.lost_runs import watched
from lossworks.runs import RunFolder
from lossworks.specs import read_yaml
from lossworks.specs.files import located
from lossworks.tracking import Journal, check_tracking
from lossworks.tracking.store import TrackedStatus
from lossworks_tune.parent_run import close_parent, closing, open_parent
from lossworks_tune.periodic import repeated
from lossworks_tune.sweeps.ledger import Trial
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.space import Space
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.sweep import Sweep
from lossworks_tune.sweeps.tracking import TrialRuns


class Engine(Protocol):
    """What trains configurations; see :class:`lossworks_tune.sweeps.engines.packed.PackedSweep`.

    Attributes:
        doing: What it is at between reports, in words; empty if trials tell.
    """

    doing: str

    def run(self) -> None:
        """Train all configurations to their ends."""

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds."""


class SweepListener:
    """Receives progress of a sweep; the default ignores every event."""

    def update(self, results: Results, phase: str) -> None:
        """Take the trials as they stand; called about once a second, from a thread.

        Args:
            results: What has been found so far.
            phase: What is being done, in words.
        """

    def message(self, text: str) -> None:
        """Take a sentence for a person."""


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has ended.

    Attributes:
        folder: Its folder, named after its id in MLflow.
        results: What it found.
        pictures: What was drawn.
        best: The winner as a spec that `lossworks train` takes; None if nothing came to its end.
    """

    folder: RunFolder
    results: Results
    pictures: tuple[Path, ...]
    best: Path | None


def sweep(
    spec: SweepSpec,
    *,
    resume: RunFolder | None = None,
    address: str | None = None,
    listener: SweepListener | None = None,
) -> SweepResult:
    """Run a sweep as ``spec`` says, or go on with one.

    Args:
        spec: The sweep.
        resume: Go on with this run: trials that have ended are kept, the others go on.
        address: A Ray cluster to join, for ``engine=ray``.
        listener: Receives its progress.

    Raises:
        UserError: Something in the spec can't work, or an objective is not reported.
        RunError: The engine failed, or no configuration came to its end.
    """
    spec = located(spec)
    check_tracking(spec.tracking)
    RunFolder.check_storage(spec)
    space = spec.make_space()
    # Before anything is entered anywhere.
    name = engine_of(spec, space)
    if name == "ray" and address is None and "RAY_ADDRESS" not in os.environ:
        from lossworks_tune.sweeps.engines.ray_tune import require_local_room

        require_local_room(spec, space)
    folder = open_parent(spec, "sweep", spec.flat(), resume)
    with folder.hold(), watched(folder):
        running = Sweep(spec, space, folder.path)
        return _Run(running, folder, listener or SweepListener()).run(_make(name, running, address))


class _Run:
    """One attempt at a sweep: its trials are shown and tracked while an engine trains them.

    Args:
        sweep: The sweep.
        folder: Of its run.
        listener: Receives its progress.
    """

    def __init__(self, sweep: Sweep, folder: RunFolder, listener: SweepListener) -> None:
        self._sweep, self._folder, self._listener = sweep, folder, listener
        self._runs = TrialRuns(sweep, folder)
        self._phase, self._complaint = "starting", ""
        self._engine: Engine | None = None
        self._files: list[Path] = []

    def run(self, engine: Engine) -> SweepResult:
        """Search, confirm and draw, and close the run however it ended.

        Raises:
            RunError: No configuration came to its end.
        """
        with closing(self._close):
            with repeated(self._look):
                self._train(engine)
            results = self._sweep.results()
            if not results.ranked:
                raise RunError(f"run {self._folder.run_id}: {_why_nothing(results)}")
        best = next((file for file in self._files if file.name == "best.yaml"), None)
        pictures = tuple(file for file in self._files if file.suffix == ".png")
        return SweepResult(self._folder, results, pictures, best)

    def _train(self, engine: Engine) -> None:
        self._phase, self._engine = "searching", engine
        if os.getloadavg()[0] > 0.75 * (os.cpu_count() or 1):
            self._listener.message(
                "this machine is busy with other work: where training is slow, OMP_NUM_THREADS=1 before the "
                "command keeps its threads from waiting for each other"
            )
        engine.run()
        self._phase = "confirming on fresh seeds"
        engine.doing = ""
        engine.confirm(self._sweep.results().to_confirm())

    def _look(self) -> None:
        """Let the trials be seen and bring them to MLflow; a store that is away is named once."""
        results = self._sweep.results()
        doing = self._engine.doing if self._engine else ""
        self._listener.update(results, f"{self._phase}, {doing}" if doing else self._phase)
        complaint = self._runs.try_sync(results)
        if complaint and not self._complaint:
            self._listener.message(f"{complaint}; trials go on and wait in {self._folder.path}")
        self._complaint = complaint

    def _close(self, status: TrackedStatus, reason: str) -> None:
        self._files = _finish(self._sweep, self._folder)
        complaint = self._runs.try_sync(self._sweep.results())
        complaint = complaint or close_parent(self._sweep.spec, self._folder, status, self._files, reason)
        if complaint:
            self._listener.message(complaint)


def engine_of(spec: SweepSpec, space: Space) -> str:
    """Return the engine of a sweep.

    Raises:
        UserError: The one that is asked for can't train it.
    """
    why = _not_packed(spec, space)
    if spec.engine == "packed" and why:
        raise UserError(f"engine=packed: {why}; use engine=ray")
    name = "ray" if spec.engine == "ray" or why else "packed"
    if name == "packed" and spec.scheduler.of_populations:
        _require_handed_on(spec, space)
    if name == "ray" and spec.scheduler.of_populations:
        copies = "copies parameters between trainings, which engine=packed does"
        raise UserError(f"scheduler.kind={spec.scheduler.kind} {copies}" + (f", but {why}" if why else ""))
    return name


def _not_packed(spec: SweepSpec, space: Space) -> str | None:
    from lossworks_tune.packs import reason_against

    for name, fields in space.corners():
        if why := reason_against(space.task, space.training(fields, spec.seeds[0])):
            return f"space.{name}: {why}" if name in space.general else why
    return None


def _require_handed_on(spec: SweepSpec, space: Space) -> None:
    """Refuse a population in which parameters of one configuration would not be those of another.

    Raises:
        UserError: Naming the field of the space.
    """
    from lossworks.training.packed import alike

    first = alike(space.training(space.anchors()[0][1], spec.seeds[0]))
    for name, fields in space.corners():
        if alike(space.training(fields, spec.seeds[0])) != first:
            raise UserError(
                f"space.{name}: scheduler.kind={spec.scheduler.kind} hands trained parameters from one "
                f"configuration to another, and {name} changes their shapes or what they are trained on; "
                "leave it out of the space, or take another scheduler"
            )


def _make(name: str, sweep: Sweep, address: str | None) -> Engine:
    if name == "packed":
        from lossworks_tune.sweeps.engines.packed import PackedSweep

        return PackedSweep(sweep)
    from lossworks_tune.sweeps.engines.ray_tune import RaySweep

    return RaySweep(sweep, address)


def read_sweep_spec(folder: RunFolder) -> SweepSpec:
    """Return the spec of a sweep's run.

    Raises:
        UserError: The run is no sweep.
    """
    return SweepSpec.parse(read_yaml(folder.spec_file), source=str(folder.spec_file))


def require_same(stored: SweepSpec, asked: SweepSpec) -> None:
    """Refuse to go on with another sweep than was begun.

    Raises:
        UserError: Naming every field that differs, with both values.
    """
    old, new = stored.flat(), asked.flat()
    free = ("tracking.", "storage", "time_s", "name")
    names = [name for name in {**old, **new} if not name.startswith(free)]
    changed = [f"{n} (was {old.get(n)}, now {new.get(n)})" for n in names if old.get(n) != new.get(n)]
    if changed:
        raise UserError(f"--resume: trials were begun with another spec: {'; '.join(changed)}")


def _finish(sweep: Sweep, folder: RunFolder) -> list[Path]:
    """Write and draw what was found; return the files."""
    from lossworks_tune.sweeps.pictures import draw_all

    results = sweep.results()
    table = sweep.path / "trials.csv"
    results.write_csv(table)
    files = [table, *draw_all(results, sweep.path)]
    if results.winner is not None:
        files.append(_write_best(results, results.winner, sweep.path / "best.yaml"))
        _record_winner(results, results.winner, folder)
    return files


def _write_best(results: Results, winner: Trial, path: Path) -> Path:
    """Write the winner as a spec that its own command takes."""
    training = results.space.training(winner.configuration.fields, results.spec.seeds[0])
    head = f"# The best of {len(results.trials)} configurations: {winner.configuration.title}\n"
    values = yaml.safe_dump(training.model_dump(mode="json"), sort_keys=False)
    write_atomically(path, head + values)
    return path


def _record_winner(results: Results, winner: Trial, folder: RunFolder) -> None:
    found = {}
    for metric in results.metrics:
        found[f"best/{metric}"] = winner.value(metric)
        fresh = results.fresh(winner, metric)
        if fresh is not None:
            found[f"best_on_fresh_seeds/{metric}"] = fresh.value
    with Journal.open(folder.journal) as journal:
        journal.write(len(results.trials), found)


def _why_nothing(results: Results) -> str:
    failed = [trial for trial in results.trials if trial.status == "failed"]
    why = f", the first because {failed[0].reason}" if failed else ""
    return f"no configuration came to its end: {len(failed)} of {len(results.trials)} failed{why}"
