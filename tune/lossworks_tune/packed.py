"""``engine=packed``: configurations trained at once in this process, stopped early and refilled.

The driver is a deterministic function of the sweep and of what trainings measure. So an interrupted sweep
goes on by doing it over with the measurements on disk in place of trainings, up to the last saved tensors.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler
from torch import Tensor

from lossworks.errors import RunError, UserError
from lossworks.tensors import load_tensors, metadata_of, write_tensors
from lossworks.tracking import Journal
from lossworks.training.packed import PackedRun, Report, advance
from lossworks_tune.ledger import Configuration, End, Trial, TrialFolder, folder_of, folders
from lossworks_tune.proposals import Proposals
from lossworks_tune.results import CONFIRMED, TRIALS
from lossworks_tune.scheduling import TIME, Controller, build_scheduler, source_of
from lossworks_tune.space import Space
from lossworks_tune.specs import SweepSpec
from lossworks_tune.stopping import Leader, require_reported

_FLOATS_AT_ONCE = 2**22  # entries of the parameters of runs trained at once, so that a step stays in caches
_SAVE_S = 5.0
_KEPT = 2  # newest states


@dataclass(eq=False)
class _Member:
    """A configuration at work.

    Attributes:
        configuration: What it trains.
        folder: Where it is kept.
        run: The training of its present seed.
        scheduled: What the scheduler knows it by; None for anchors, which always come to their end.
        seed: Which of the sweep's seeds it trains, from 0.
        reports: How many it has made, over all seeds.
        finals: Last metrics of its earlier seeds.
        waits: Whether the scheduler has paused it.
    """

    configuration: Configuration
    folder: TrialFolder
    run: PackedRun
    scheduled: RayTrial | None
    seed: int = 0
    reports: int = 0
    finals: list[dict[str, float]] = field(default_factory=list)
    waits: bool = False

    @property
    def name(self) -> str:
        """Return what files and the scheduler call it."""
        return self.folder.path.name


class PackedSweep:
    """Runs a sweep, or goes on with one.

    Args:
        spec: The sweep.
        space: What it searches.
        path: Folder of the run.
    """

    def __init__(self, spec: SweepSpec, space: Space, path: Path) -> None:
        self._spec, self._space, self._path = spec, space, path
        first = space.training(space.anchors()[0][1], spec.seeds[0])
        self._steps, every = first.steps, first.evaluation.every
        reports = len(spec.seeds) * math.ceil(self._steps / every)
        self._controller = Controller(build_scheduler(spec, space, reports, every), spec.seed)
        self._proposals = Proposals(spec, space)
        self._leader = Leader(spec)
        self._live: list[_Member] = []
        self._round = 0
        self._began = self._saved = time.monotonic()
        self._closed_at: int | None = None
        self._past = _Past.read(path)

    def run(self) -> None:
        """Train all configurations to their ends.

        Raises:
            UserError: An objective is not among what is reported.
            RunError: A result can't be written.
        """
        while True:
            self._fill()
            if not self._live:
                return
            self._round += 1
            ended = self._take_round()
            if self._past.round == self._round:
                self._go_on_live()
            elif self._round > self._past.round and (ended or time.monotonic() - self._saved > _SAVE_S):
                self._save()

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds, all at once."""
        seeds = self._spec.confirm.seeds
        waiting: dict[int, list[PackedRun]] = {}
        for trial in trials:
            number = trial.configuration.number
            folder = folder_of(self._path / CONFIRMED, number)
            if folder.end is None:
                folder.begin(trial.configuration)
                fields = trial.configuration.fields
                specs = [self._space.training(fields, seed) for seed in seeds]
                waiting[number] = [PackedRun.start(spec) for spec in specs]
        reports: dict[int, Report] = {}
        runs = [run for of in waiting.values() for run in of]
        while runs:
            for group in _groups(runs, lambda run: run):
                reports |= {id(run): report for run, report in _advanced(group)}
            runs = [run for run in runs if run.step < self._steps and reports[id(run)].failure is None]
        for number, of in waiting.items():
            self._keep_confirmed(number, [reports[id(run)] for run in of])

    def _keep_confirmed(self, number: int, reports: list[Report]) -> None:
        folder = folder_of(self._path / CONFIRMED, number)
        failure = next((report.failure for report in reports if report.failure), None)
        with Journal.open(folder.journal) as journal:
            for place, report in enumerate(reports):
                if report.failure is None:
                    journal.write((place + 1) * self._steps, report.metrics)
        folder.finish(End("failed" if failure else "finished", failure or "", self._steps * len(reports)))

    def _fill(self) -> None:
        """Begin as many configurations as there is room for."""
        if (
            self._closed_at is None
            and self._past.closed_at is not None
            and self._round >= self._past.closed_at
        ):
            self._closed_at = self._past.closed_at
        late = self._spec.time_s is not None and self._round > 0 and self._elapsed() > self._spec.time_s
        if self._closed_at is None and late and self._round >= self._past.round:
            self._closed_at = self._round
        while self._closed_at is None and len(self._live) < at_once(self._spec):
            configuration = self._proposals.next()
            if configuration is None:
                return
            self._begin(configuration)

    def _elapsed(self) -> float:
        return self._past.elapsed + time.monotonic() - self._began

    def _begin(self, configuration: Configuration) -> None:
        folder = folder_of(self._path / TRIALS, configuration.number)
        folder.begin(configuration)
        try:
            run = PackedRun.start(self._space.training(configuration.fields, self._spec.seeds[0]))
        except UserError as error:  # ends of ranges are checked before; combinations may still be refused
            folder.finish(End("failed", str(error), 0))
            self._proposals.tell(configuration.number, None, whole=False)
            return
        trial = None
        if not configuration.anchor:
            trial = self._controller.add(folder.path.name, configuration.parameters)
        self._live.append(_Member(configuration, folder, run, trial))

    def _take_round(self) -> bool:
        """Train everything that doesn't wait to its next report; return whether a trial has ended."""
        before = len(self._live)
        at_work = [member for member in self._live if not member.waits]
        for group in _groups(at_work, lambda member: member.run):
            for member, report in self._reports(group):
                self._take(member, report)
        for trial in self._controller.stopped:
            member = next(member for member in self._live if member.scheduled is trial)
            self._end(member, "stopped", f"by {self._spec.scheduler.kind}")
        self._controller.stopped.clear()
        self._wake()
        return len(self._live) < before

    def _wake(self) -> None:
        woken = self._controller.unpaused()
        waiting = [member for member in self._live if member.waits]
        for member in waiting:
            # Should all wait, the scheduler waits for trials that never come: what is here goes on.
            if member.scheduled in woken or len(waiting) == len(self._live):
                member.waits = False
                if member.scheduled is not None:
                    member.scheduled.set_status(RayTrial.RUNNING)

    def _reports(self, group: Sequence[_Member]) -> Iterator[tuple[_Member, Report]]:
        """Yield what members of a group report next, in order of their numbers."""
        if self._round <= self._past.round:
            for member in group:
                member.run.step += member.run.until_report
                yield member, self._past.report(member.folder, self._step(member), member.run.step)
            return
        by_run = {id(member.run): member for member in group}
        for run, report in _advanced([member.run for member in group]):
            yield by_run[id(run)], report

    def _step(self, member: _Member) -> int:
        """Return a member's steps over all its seeds."""
        return member.seed * self._steps + member.run.step

    def _take(self, member: _Member, report: Report) -> None:
        """Keep a report and do what follows from it."""
        if report.failure is not None:
            seed = self._spec.seeds[member.seed]
            self._end(member, "failed", f"seed {seed}: {report.failure}")
            return
        require_reported(self._spec, report.metrics)
        member.reports += 1
        with Journal.open(member.folder.journal) as journal:
            journal.write(self._step(member), report.metrics)
        whole = member.run.step == self._steps
        values = self._values(member, report.metrics)
        decision = self._decision(member, values)
        if whole:
            member.finals.append(report.metrics)
            if len(member.finals) == len(self._spec.seeds):
                self._end(member, "finished", "", values)
                return
            if self._leader.beats(member.finals):
                self._end(member, "stopped", "worse than the leader on the same seeds", values)
                return
        if decision == TrialScheduler.STOP:
            self._end(member, "stopped", f"by {self._spec.scheduler.kind}", values)
            return
        if whole:
            member.seed += 1
            fields = member.configuration.fields
            member.run = PackedRun.start(self._space.training(fields, self._spec.seeds[member.seed]))

    def _values(self, member: _Member, metrics: dict[str, float]) -> list[float]:
        """Return the objectives' means over earlier seeds' ends and the present one."""
        so_far = [*member.finals, metrics]
        return [sum(one[metric] for one in so_far) / len(so_far) for metric in self._spec.objectives]

    def _decision(self, member: _Member, values: list[float]) -> str:
        if member.scheduled is None:
            return str(TrialScheduler.CONTINUE)
        result = {TIME: member.reports, **dict(zip(self._spec.objectives, values, strict=True))}
        decision = self._controller.decide(member.scheduled, result)
        if self._spec.scheduler.of_populations:
            self._take_over()
            return str(TrialScheduler.CONTINUE)
        member.waits = decision == TrialScheduler.PAUSE
        return decision

    def _take_over(self) -> None:
        """Let those who are told to take over others' parameters do so."""
        by_name = {member.name: member for member in self._live}
        for member in self._live:
            source = None if member.scheduled is None else source_of(member.scheduled)
            if member.scheduled is not None:
                member.scheduled.set_status(RayTrial.RUNNING)
            if source is None or source not in by_name or member.scheduled is None:
                continue
            fields = self._space.fields(member.scheduled.config)
            own = member.configuration
            changed = Configuration(own.number, fields, dict(member.scheduled.config), own.anchor)
            member.configuration = changed
            member.folder.begin(changed)
            theirs = by_name[source].run
            spec = self._space.training(fields, self._spec.seeds[member.seed])
            member.run = PackedRun(spec, theirs.step, theirs.tensors)

    def _end(self, member: _Member, status: str, reason: str, values: list[float] | None = None) -> None:
        member.folder.finish(End(status, reason, self._step(member)))  # type: ignore[arg-type]
        self._live.remove(member)
        whole = status == "finished"
        self._proposals.tell(member.configuration.number, values, whole=whole, step=self._step(member))
        if whole:
            self._leader.learn(member.finals)
        if member.scheduled is not None:
            result = {TIME: member.reports, **dict(zip(self._spec.objectives, values or (), strict=False))}
            self._controller.end(member.scheduled, result, failed=status == "failed")

    def _go_on_live(self) -> None:
        """Give every training the tensors that were saved after this round."""
        for member in self._live:
            member.run.tensors = {
                kind: {name: self._past.tensors[f"{member.name}/{kind}/{name}"] for name in of}
                for kind, of in member.run.tensors.items()
            }

    def _save(self) -> None:
        """Save where every training stands, and drop older states."""
        folder = self._path / "state"
        folder.mkdir(exist_ok=True)
        tensors = {
            f"{member.name}/{kind}/{name}": value.clone()
            for member in self._live
            for kind, of in member.run.tensors.items()
            for name, value in of.items()
        }
        closed = "" if self._closed_at is None else str(self._closed_at)
        file = folder / f"{self._round:07d}.safetensors"
        write_tensors(file, tensors, elapsed=str(self._elapsed()), closed_at=closed)
        for old in sorted(folder.glob("*.safetensors"))[:-_KEPT]:
            old.unlink()
        self._saved = time.monotonic()


@dataclass(frozen=True, eq=False)
class _Past:
    """What an interrupted sweep left: its last saved round, with tensors; round 0 where it left nothing."""

    round: int = 0
    elapsed: float = 0.0
    closed_at: int | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "_Past":
        for file in sorted((path / "state").glob("*.safetensors"), reverse=True):
            try:
                tensors, told = load_tensors(file), metadata_of(file)
            except RunError:
                continue  # damaged: the one before it is used
            closed = int(told["closed_at"]) if told["closed_at"] else None
            rows: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
            for folder in folders(path / TRIALS):
                rows[folder.path.name] = {row["step"]: row["metrics"] for row in folder.rows()}
            return cls(int(file.stem), float(told["elapsed"]), closed, tensors, rows)
        return cls()

    def report(self, folder: TrialFolder, step: int, of_seed: int) -> Report:
        """Return what a trial reported at a step over all its seeds."""
        metrics = self.rows[folder.path.name].get(step)
        if metrics is not None:
            return Report(of_seed, metrics)
        end = folder.end
        reason = end.reason.partition(": ")[2] if end else "its results are lost"
        return Report(of_seed, {}, reason)


def at_once(spec: SweepSpec) -> int:
    """Return how many configurations are at work together."""
    if spec.at_once is not None:
        return spec.at_once
    if spec.search.kind in ("tpe", "nsga2"):
        return max(4, min(64, spec.trials // 8))  # it learns from those that have ended
    return 64


Item = TypeVar("Item")


def _groups(items: Iterable[Item], run_of: Callable[[Item], PackedRun]) -> Iterator[list[Item]]:
    """Yield items that can be advanced together: alike, and as far from their next report."""
    found: dict[tuple[str, int], list[Item]] = defaultdict(list)
    for item in items:
        run = run_of(item)
        found[run.common, run.until_report].append(item)
    for group in found.values():
        size = sum(value.numel() for value in run_of(group[0]).tensors["params"].values())
        many = max(1, _FLOATS_AT_ONCE // size)
        yield from (group[start : start + many] for start in range(0, len(group), many))


def _advanced(runs: Sequence[PackedRun]) -> list[tuple[PackedRun, Report]]:
    """Train runs to their next report; what fails together is tried one by one, to find who it is."""
    steps = runs[0].until_report
    try:
        return list(zip(runs, advance(runs, steps), strict=True))
    except (RuntimeError, MemoryError, UserError) as error:
        if len(runs) == 1:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return [(runs[0], Report(runs[0].step, {}, lines[-1]))]
        return [pair for run in runs for pair in _advanced([run])]
