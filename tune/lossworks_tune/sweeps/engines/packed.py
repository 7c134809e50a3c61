"""``engine=packed``: configurations trained at once in this process, stopped early and refilled.

The driver is a deterministic function of the sweep and of what trainings measure. So an interrupted sweep
goes on by doing it over with the measurements on disk in place of trainings, up to the last saved tensors.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import TrialScheduler

from lossworks.errors import UserError
from lossworks.tracking import Journal
from lossworks.training.packed import PackedReport, PackedRun
from lossworks_tune.packs import advanced, groups, reason_against, trained
from lossworks_tune.sweeps.engines.packed_state import Past, save
from lossworks_tune.sweeps.engines.scheduling import TIME, Controller, build_scheduler, source_of
from lossworks_tune.sweeps.engines.stopping import Leader
from lossworks_tune.sweeps.ledger import Configuration, End, Trial, TrialFolder, TrialStatus
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.sweep import Sweep

_SAVE_S = 5.0


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
        sweep: The sweep.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._spec, self._space = sweep, sweep.spec, sweep.space
        self._steps = sweep.steps
        self._controller = Controller(build_scheduler(sweep), sweep.spec.seed)
        self._proposals = Proposals(sweep.spec, sweep.space)
        self._leader = Leader(sweep.spec)
        self._live: list[_Member] = []
        self._round = 0
        self._began = self._saved = time.monotonic()
        self._closed_at: int | None = None
        self._past = Past.read(sweep)
        self.doing = ""

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
                self._restore_tensors()
            elif self._round > self._past.round and (ended or time.monotonic() - self._saved > _SAVE_S):
                self._save()

    def confirm(self, trials: Sequence[Trial]) -> None:
        """Train configurations again on fresh seeds, all at once."""
        seeds = self._spec.confirm.seeds
        waiting: dict[int, list[PackedRun]] = {}
        for trial in trials:
            number = trial.configuration.number
            folder = self._sweep.confirmed.of(number)
            if folder.end is None:
                folder.begin(trial.configuration)
                fields = trial.configuration.fields
                specs = [self._space.training(fields, seed) for seed in seeds]
                waiting[number] = [PackedRun.start(spec) for spec in specs]
        runs = [run for of in waiting.values() for run in of]
        reports = {id(run): report for run, report in trained(runs)}
        for number, of in waiting.items():
            self._keep_confirmed(number, [reports[id(run)] for run in of])

    def _keep_confirmed(self, number: int, reports: list[PackedReport]) -> None:
        folder = self._sweep.confirmed.of(number)
        failure = next(
            (
                f"seed {seed}: {report.failure}"
                for seed, report in zip(self._spec.confirm.seeds, reports, strict=True)
                if report.failure
            ),
            None,
        )
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
        if self._round >= self._past.round:  # no more of the past to do over
            # A sweep that ended by its time and is given more begins further configurations.
            self._closed_at = (self._closed_at or self._round) if late else None
        while self._closed_at is None and len(self._live) < at_once(self._spec):
            configuration = self._proposals.next()
            if configuration is None:
                return
            self._begin(configuration)

    def _elapsed(self) -> float:
        return self._past.elapsed + time.monotonic() - self._began

    def _begin(self, configuration: Configuration) -> None:
        folder = self._sweep.trials.of(configuration.number)
        folder.begin(configuration)
        try:
            training = self._space.training(configuration.fields, self._spec.seeds[0])
            if why := reason_against(self._space.task, training):
                raise UserError(f"engine=packed: {why}")
            run = PackedRun.start(training)
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
        for group in groups(at_work, lambda member: member.run):
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

    def _reports(self, group: Sequence[_Member]) -> Iterator[tuple[_Member, PackedReport]]:
        """Yield what members of a group report next, in order of their numbers."""
        if self._round <= self._past.round:
            for member in group:
                member.run.step += member.run.until_report
                yield member, self._past.report(member.folder, self._step(member), member.run.step)
            return
        by_run = {id(member.run): member for member in group}
        first, count = group[0], len(group)
        done, seeds = first.run.step, len(self._spec.seeds)
        which = f", seed {first.seed + 1} of {seeds}" if seeds > 1 else ""

        def note(step: int) -> None:
            many = f"{count} configurations" if count > 1 else "one configuration"
            self.doing = f"{many} at step {done + step} of {self._steps}{which}"

        for run, report in advanced([member.run for member in group], note):
            yield by_run[id(run)], report

    def _step(self, member: _Member) -> int:
        """Return a member's steps over all its seeds."""
        return member.seed * self._steps + member.run.step

    def _take(self, member: _Member, report: PackedReport) -> None:
        """Keep a report and do what follows from it."""
        if report.failure is not None:
            seed = self._spec.seeds[member.seed]
            self._end(member, "failed", f"seed {seed}: {report.failure}")
            return
        values = self._spec.means([*member.finals, report.metrics])
        member.reports += 1
        with Journal.open(member.folder.journal) as journal:
            journal.write(self._step(member), report.metrics)
        whole = member.run.step == self._steps
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

    def _decision(self, member: _Member, values: Mapping[str, float]) -> str:
        if member.scheduled is None:
            return str(TrialScheduler.CONTINUE)
        result = {TIME: member.reports, **values}
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
            try:
                spec = self._space.training(fields, self._spec.seeds[member.seed])
            except UserError:
                continue  # a change that a spec written by hand would not be allowed either
            own = member.configuration
            changed = Configuration(own.number, fields, dict(member.scheduled.config), own.anchor)
            member.configuration = changed
            member.folder.begin(changed)
            theirs = by_name[source].run
            member.run = PackedRun(spec, theirs.step, theirs.tensors)

    def _end(
        self, member: _Member, status: TrialStatus, reason: str, values: Mapping[str, float] | None = None
    ) -> None:
        member.folder.finish(End(status, reason, self._step(member)))
        self._live.remove(member)
        whole = status == "finished"
        found = None if values is None else list(values.values())
        self._proposals.tell(member.configuration.number, found, whole=whole, step=self._step(member))
        if whole:
            self._leader.learn(member.finals)
        if member.scheduled is not None:
            result = {TIME: member.reports, **(values or {})}
            self._controller.end(member.scheduled, result, failed=status == "failed")

    def _restore_tensors(self) -> None:
        """Give every training the tensors that were saved after this round."""
        for member in self._live:
            member.run.tensors = {
                kind: {name: self._past.tensors[f"{member.name}/{kind}/{name}"] for name in of}
                for kind, of in member.run.tensors.items()
            }

    def _save(self) -> None:
        """Save where every training stands."""
        tensors = {
            f"{member.name}/{kind}/{name}": value.clone()
            for member in self._live
            for kind, of in member.run.tensors.items()
            for name, value in of.items()
        }
        save(self._sweep, self._round, tensors, self._elapsed(), self._closed_at)
        self._saved = time.monotonic()


def at_once(spec: SweepSpec) -> int:
    """Return how many configurations are at work together."""
    if spec.at_once is not None:
        return spec.at_once
    if spec.search.kind in ("tpe", "nsga2"):
        return max(4, min(64, spec.trials // 8))  # it learns from those that have ended
    return 64
