"""``study(spec)``: variants trained over seeds, compared, judged by what was expected, and kept in MLflow."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lossworks.errors import RunError
from lossworks.lost_runs import watched
from lossworks.runs import RunFolder
from lossworks.specs import read_yaml
from lossworks.specs.files import located
from lossworks.tracking import Journal, check_tracking
from lossworks.tracking.store import TrackedStatus
from lossworks_tune.parent_run import close_parent, closing, open_parent
from lossworks_tune.periodic import repeated
from lossworks_tune.studies import document
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.plan import StudyPlan, Training
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.store import Key, Result, ResultStore
from lossworks_tune.studies.tables import failures
from lossworks_tune.studies.tracking import VariantRuns, parameters, tags
from lossworks_tune.studies.training import check, train


class StudyListener:
    """Receives progress of a study; the default ignores every event."""

    def update(self, outcome: StudyOutcome) -> None:
        """Take what has been found so far; called about once a second, from a thread."""

    def message(self, text: str) -> None:
        """Take a sentence for a person."""


@dataclass(frozen=True)
class StudyResult:
    """A study that has ended.

    Attributes:
        folder: Its folder, named after its id in MLflow.
        outcome: What it found.
        document: All values and verdicts, as JSON.
        pictures: What was drawn.
    """

    folder: RunFolder
    outcome: StudyOutcome
    document: Path
    pictures: tuple[Path, ...]


def study(
    spec: StudySpec,
    *,
    resume: RunFolder | None = None,
    address: str | None = None,
    listener: StudyListener | None = None,
) -> StudyResult:
    """Run a study as ``spec`` says, or go on with one.

    Args:
        spec: The study.
        resume: Go on with this run: trainings that have ended are kept.
        address: A Ray cluster to join, for trainings that can't be packed.
        listener: Receives its progress.

    Raises:
        UserError: Something in the spec can't work; nothing was started.
        RunError: All trainings failed, or Ray lost one.
    """
    spec = located(spec)
    check_tracking(spec.tracking)
    RunFolder.check_storage(spec)
    plan = spec.make_plan()
    check(plan, local=address is None and "RAY_ADDRESS" not in os.environ)
    folder = open_parent(spec, "study", parameters(spec), resume)
    with folder.hold(), watched(folder):
        return _Run(spec, plan, folder, listener or StudyListener()).run(address)


def read_study_spec(folder: RunFolder) -> StudySpec:
    """Return the spec of a study's run.

    Raises:
        UserError: The run is no study.
    """
    return StudySpec.parse(read_yaml(folder.spec_file), source=str(folder.spec_file))


class _Run:
    """One attempt at a study: what has ended is shown and tracked while the rest is trained.

    Args:
        spec: The study.
        plan: Its trainings.
        folder: Of its run.
        listener: Receives its progress.
    """

    def __init__(self, spec: StudySpec, plan: StudyPlan, folder: RunFolder, listener: StudyListener) -> None:
        self._spec, self._plan, self._folder, self._listener = spec, plan, folder, listener
        self._store = ResultStore(folder.path / "results.jsonl")
        self._results: dict[Key, Result] = self._store.of(plan.trainings)
        self._firsts: dict[Key, Result] = self._store.of(plan.firsts)
        self._runs = VariantRuns(self._outcome(), folder)
        self._complaint = ""

    def run(self, address: str | None) -> StudyResult:
        """Train what has not ended, and close the run however it ended."""
        for note in self._plan.notes:
            self._listener.message(note)
        with closing(self._close):
            with repeated(self._look):
                folder = self._folder.path / "trainings"
                train(self._plan, self._waiting(), folder, address, self._keep, self._lacking)
            outcome = self._outcome()
            if len(outcome.failures) == len(self._plan.trainings):
                raise RunError(f"run {self._folder.run_id}: {failures(outcome)}")
        files = _files(self._folder.path)
        pictures = tuple(file for file in files if file.stem == "study" and file.suffix in (".png", ".svg"))
        return StudyResult(self._folder, outcome, self._folder.path / "study.json", pictures)

    def _waiting(self) -> Sequence[Training]:
        waiting = [one for one in self._plan.trainings if one.key not in self._results]
        return [*(one for one in self._plan.firsts if one.key not in self._firsts), *waiting]

    def _keep(self, training: Training, result: Result) -> None:
        self._store.add(training, result)
        if training.variant not in self._plan.variants:
            self._firsts[training.key] = result
            return
        self._results = {**self._results, training.key: result}  # another thread may be reading the old one

    def _lacking(self, training: Training) -> str:
        """Return why a training can't begin, or nothing: one before it has failed."""
        for name in training.needs:
            before = self._plan.first(name, training.seed)
            if (found := self._firsts.get(before.key)) is not None and found.failure:
                return f"{before.variant} failed: {found.failure}"
        return ""

    def _outcome(self) -> StudyOutcome:
        return StudyOutcome(self._spec, self._plan, self._results)

    def _look(self) -> None:
        """Let it be seen and bring it to MLflow; a store that is away is named once."""
        outcome = self._outcome()
        self._listener.update(outcome)
        complaint = self._runs.try_sync(outcome)
        if complaint and not self._complaint:
            self._listener.message(f"{complaint}; results wait in {self._folder.path}")
        self._complaint = complaint

    def _close(self, status: TrackedStatus, reason: str) -> None:
        outcome = self._outcome()
        _write(outcome, self._folder)
        complaint = self._runs.try_sync(outcome) or close_parent(
            self._spec, self._folder, status, _files(self._folder.path), reason, tags(outcome)
        )
        if complaint:
            self._listener.message(complaint)


def _write(outcome: StudyOutcome, folder: RunFolder) -> None:
    """Write and draw what was found."""
    from lossworks_tune.studies.picture import draw

    document.write(outcome, folder.path / "study.json")
    draw(outcome, folder.path / "study")
    words = Counter(verdict.word for verdict in outcome.verdicts)
    counts = {f"expectations/{word.replace(' ', '_')}": count for word, count in words.items()}
    counts |= {"trainings/ended": len(outcome.results), "trainings/failed": len(outcome.failures)}
    with Journal.open(folder.journal) as journal:
        journal.write(len(outcome.results), counts)


def _files(path: Path) -> list[Path]:
    names = ("study.json", "study.png", "study.svg", "results.jsonl")
    return [path / name for name in names if (path / name).is_file()]
