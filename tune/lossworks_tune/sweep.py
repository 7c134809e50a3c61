"""``sweep(spec)``: configurations trained, ranked, confirmed on fresh seeds, drawn, and kept in MLflow."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from lossworks.errors import LossworksError, RunError, UserError
from lossworks.runs import RunFolder
from lossworks.specs import read_yaml
from lossworks.tracking import Journal, check_tracking, create_run, deliver, open_run
from lossworks_tune.ledger import Trial
from lossworks_tune.results import Results
from lossworks_tune.space import Space
from lossworks_tune.specs import SweepSpec
from lossworks_tune.tracking import Children, close, safely

_LOOK_S = 1.0


class Engine(Protocol):
    """What trains configurations; see :class:`lossworks_tune.packed.PackedSweep`."""

    def run(self) -> None:
        """Train all configurations to their ends."""

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds."""


class Watcher:
    """Sees a sweep go on; this one looks away."""

    def look(self, results: Results, doing: str) -> None:
        """See the trials as they stand; called about once a second, from a thread."""

    def say(self, text: str) -> None:
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
    watcher: Watcher | None = None,
) -> SweepResult:
    """Run a sweep as ``spec`` says, or go on with one.

    Args:
        spec: The sweep.
        resume: Go on with this run: trials that have ended are kept, the others go on.
        address: A Ray cluster to join, for ``engine=ray``.
        watcher: Sees it go on.

    Raises:
        UserError: Something in the spec can't work, or an objective is not reported.
        RunError: The engine failed.
    """
    watcher = watcher or Watcher()
    check_tracking(spec.tracking)
    RunFolder.check_storage(spec)
    space = Space(spec)
    # Before anything is entered anywhere.
    name = engine_of(spec, space)
    if name == "ray" and address is None and "RAY_ADDRESS" not in os.environ:
        from lossworks_tune.ray_engine import require_local_room

        require_local_room(spec, space)
    folder = _open(spec, resume)
    with folder.hold():
        engine = _make(name, spec, space, folder.path, address)
        children = Children(spec, space, folder)
        status, reason, artifacts = "FAILED", "the driver failed", list[Path]()
        try:
            with _watched(spec, space, folder, children, watcher) as doing:
                doing("searching")
                engine.run()
                doing("confirming on fresh seeds")
                engine.confirm(Results.read(spec, space, folder.path).to_confirm())
            results = Results.read(spec, space, folder.path)
            status, reason = ("FINISHED", "") if results.ranked else ("FAILED", _why_nothing(results))
        except KeyboardInterrupt:
            status, reason = "KILLED", "stopped"
            raise
        except LossworksError as error:
            reason = str(error)
            raise
        finally:
            artifacts = _finish(spec, space, folder)
            complaint = safely(children) or _closed(spec, folder, status, artifacts, reason)
            if complaint:
                watcher.say(complaint)
    best = folder.path / "best.yaml"
    pictures = tuple(path for path in artifacts if path.suffix == ".png")
    if not results.ranked:
        raise RunError(f"run {folder.run_id}: {reason}")
    return SweepResult(folder, results, pictures, best if best.is_file() else None)


def engine_of(spec: SweepSpec, space: Space) -> str:
    """Return the engine of a sweep.

    Raises:
        UserError: The one that is asked for can't train it.
    """
    why = _not_packed(spec, space)
    if spec.engine == "packed" and why:
        raise UserError(f"engine=packed: {why}; use engine=ray")
    name = "ray" if spec.engine == "ray" or why else "packed"
    if name == "ray" and spec.scheduler.of_populations:
        copies = "copies parameters between trainings, which engine=packed does"
        raise UserError(f"scheduler.kind={spec.scheduler.kind} {copies}" + (f", but {why}" if why else ""))
    return name


def _not_packed(spec: SweepSpec, space: Space) -> str | None:
    if space.task == "federation":
        return "federations train clients at once already"
    from lossworks.training.packed import obstacle

    trainings = (space.training(fields, spec.seeds[0]) for _, fields in space.anchors())
    return next((why for training in trainings if (why := obstacle(training))), None)


def _make(name: str, spec: SweepSpec, space: Space, path: Path, address: str | None) -> Engine:
    if name == "packed":
        from lossworks_tune.packed import PackedSweep

        return PackedSweep(spec, space, path)
    from lossworks_tune.ray_engine import RaySweep

    return RaySweep(spec, space, path, address)


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


def _open(spec: SweepSpec, resume: RunFolder | None) -> RunFolder:
    if resume is not None:
        open_run(spec.tracking, resume.run_id)
        return resume
    parameters = {name: value for name, value in spec.flat().items() if not name.startswith("tracking.")}
    run_id = create_run(
        spec.tracking, name=spec.name, parameters=parameters, tags={"lossworks.kind": "sweep"}
    )
    return RunFolder.create(spec, run_id)


@contextmanager
def _watched(
    spec: SweepSpec, space: Space, folder: RunFolder, children: Children, watcher: Watcher
) -> Iterator[Callable[[str], None]]:
    """Let trials be seen, and brought to MLflow, about once a second meanwhile."""
    over, doing, said = threading.Event(), ["starting"], [""]

    def look() -> None:
        while not over.wait(_LOOK_S):
            watcher.look(Results.read(spec, space, folder.path), doing[0])
            complaint = safely(children)
            if complaint and not said[0]:
                watcher.say(f"{complaint}; trials go on and wait in {folder.path}")
            said[0] = complaint

    thread = threading.Thread(target=look, name="lossworks-sweep", daemon=True)
    thread.start()
    try:
        yield lambda text: doing.__setitem__(0, text)
    finally:
        over.set()
        thread.join()
        watcher.look(Results.read(spec, space, folder.path), doing[0])


def _finish(spec: SweepSpec, space: Space, folder: RunFolder) -> list[Path]:
    """Write and draw what was found; return the files."""
    from lossworks_tune.pictures import draw_all

    results = Results.read(spec, space, folder.path)
    table = folder.path / "trials.csv"
    results.write_csv(table)
    files = [table, *draw_all(results, folder.path)]
    winner = results.winner
    if winner is not None:
        best = folder.path / "best.yaml"
        values = space.training(winner.configuration.fields, spec.seeds[0]).model_dump(mode="json")
        best.write_text(
            f"# The best of {len(results.trials)} configurations: {winner.configuration.title}\n"
            + yaml.safe_dump(values, sort_keys=False),
            encoding="utf-8",
        )
        files.append(best)
        _record_winner(results, winner, folder)
    return files


def _record_winner(results: Results, winner: Trial, folder: RunFolder) -> None:
    found = {}
    for metric in results.metrics:
        found[f"best/{metric}"] = winner.value(metric)
        fresh = results.fresh(winner, metric)
        if fresh is not None:
            found[f"best_on_fresh_seeds/{metric}"] = fresh.value
    with Journal.open(folder.journal) as journal:
        journal.write(len(results.trials), found)


def _closed(spec: SweepSpec, folder: RunFolder, status: str, artifacts: list[Path], reason: str) -> str:
    try:
        deliver(spec.tracking, folder.run_id, folder.journal)
        close(spec, folder, status, artifacts, reason)  # type: ignore[arg-type]
    except RunError as error:
        return str(error)
    return ""


def _why_nothing(results: Results) -> str:
    failed = [trial for trial in results.trials if trial.status == "failed"]
    why = f", the first because {failed[0].reason}" if failed else ""
    return f"no configuration came to its end: {len(failed)} of {len(results.trials)} failed{why}"
