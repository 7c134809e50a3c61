"""A federation as a run: its folder, its children (one a strategy and seed), their tracking."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.errors import LossworksError, RunError
from lossworks.files import write_atomically
from lossworks.runs import RunFolder
from lossworks.tensors import load_tensors
from lossworks_federated.server.kept_models import BestModel, keep_as_run
from lossworks_federated.server.participants import participants_of
from lossworks_federated.server.rounds import FederationOutcome, RoundFiles
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.specs import FederationSpec, StrategySpec

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from lossworks.tracking import JournalRow

_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass(frozen=True)
class Child:
    """One strategy with one seed.

    Attributes:
        strategy: The strategy.
        seed: The seed.
        files: What it leaves; the folder is in the federation's.
    """

    strategy: StrategySpec
    seed: int
    files: RoundFiles

    @property
    def title(self) -> str:
        """Return strategy and seed in words."""
        return f"{self.strategy.title}, seed {self.seed}"

    @property
    def model_run(self) -> str | None:
        """Return the id of the run of training that its global model was made one of, if it was."""
        marker = self.files.path / "model-run"
        return marker.read_text(encoding="utf-8").strip() if marker.is_file() else None

    @property
    def outcome(self) -> FederationOutcome | None:
        """Return how it ended, or None if it has not."""
        return FederationOutcome.read(self.files.outcome) if self.files.outcome.is_file() else None


class FederationWatcher:
    """Receives the progress of a federation; the default ignores every event."""

    def begin(self, child: Child, number: int, of: int, done: int) -> None:
        """Receive that a child begins, or goes on after ``done`` rounds."""

    def row(self, row: "JournalRow") -> None:
        """Receive a row of a child's journal; called from a thread."""

    def end(self, child: Child) -> None:
        """Receive that a child has ended."""

    def say(self, text: str) -> None:
        """Receive a sentence for a person."""


class Session:
    """Runs the children of a federation one after the other.

    Args:
        spec: The federation.
        folder: Of the run.
        watcher: Receives its progress.

    Attributes:
        participants: Who takes part.
    """

    def __init__(self, spec: FederationSpec, folder: RunFolder, watcher: FederationWatcher) -> None:
        self.spec, self.folder, self._watcher = spec, folder, watcher
        self.participants = participants_of(spec)
        pairs = [(strategy, seed) for seed in spec.seeds for strategy in spec.strategies]
        self.children = [
            Child(strategy, seed, RoundFiles(folder.path / _folder_name(index, strategy, seed)))
            for index, (strategy, seed) in enumerate(pairs)
        ]

    def run(self, grid_of: Callable[[Child], "Grid"]) -> None:
        """Run every child that has not finished; one that fails doesn't stop the others.

        Args:
            grid_of: Gives the engine for a child.
        """
        for number, child in enumerate(self.children, 1):
            outcome = child.outcome
            if outcome is not None and outcome.status == "finished":
                continue
            child_id = self._enter(child)
            self._watcher.begin(child, number, len(self.children), child.files.rounds_done())
            try:
                self._follow(child, child_id, grid_of)
            except LossworksError as error:
                self._watcher.say(f"{child.title}: failed: {error}")
            finally:
                self._watcher.end(child)
                self._keep_model(child, child_id)
                self._finish(child, child_id)

    def setup(self, child: Child) -> SharedSetup | None:
        """Return what a child's clients have in common, where the server knows it."""
        return self.participants.setup(child.strategy, child.seed)

    def _follow(self, child: Child, child_id: str, grid_of: Callable[[Child], "Grid"]) -> None:
        """Do a child's rounds while its journal goes to MLflow and to the watcher."""
        from lossworks.tracking import Follower

        watcher, setup = self._watcher, self.setup(child)
        if setup is not None and setup.split.left_out:
            split = self.spec.split
            watcher.say(
                f"left out are {len(setup.split.left_out)} owners: with fewer than split.min_size="
                f"{split.min_size} examples, or beyond split.clients={split.clients}"
            )
        journal = child.files.journal
        follower = Follower(self.spec.tracking, child_id, journal, on_row=watcher.row, on_message=watcher.say)
        with follower:
            self.participants.rounds(child.strategy, child.seed, grid_of(child), child.files).run()

    def _enter(self, child: Child) -> str:
        """Return a child's id in MLflow, entering it if it is new."""
        from lossworks.tracking import create_run, open_run

        tracking = self.spec.tracking
        marker = child.files.path / "run-id"
        alone = self.spec.model_copy(update={"strategies": (child.strategy,), "seeds": (child.seed,)})
        if marker.is_file():
            child_id = marker.read_text().strip()
            open_run(tracking, child_id)
            return child_id
        child_id = create_run(
            tracking,
            name=child.title,
            parameters={
                **_parameters(alone),
                "strategy": child.strategy.title,
                "seed": child.seed,
                **{f"strategy.{k}": v for k, v in child.strategy.hyperparameters.items()},
            },
            tags={"lossworks.strategy": child.strategy.name},
            parent=self.folder.run_id,
        )
        write_atomically(child.files.path / "spec.yaml", alone.to_yaml())
        write_atomically(marker, child_id)
        return child_id

    def _keep_model(self, child: Child, child_id: str) -> None:
        """Make a run of training out of the child's model, if it has finished."""
        outcome, setup = child.outcome, self.setup(child)
        if setup is None or outcome is None or outcome.status != "finished":
            return
        try:
            keep_as_run(
                setup,
                child_id,
                name=f"{self.spec.name}: {child.title}",
                storage=self.spec.storage,
                best=BestModel(child.files.best),
                last=(outcome.rounds, load_tensors(child.files.model)),
                metrics=outcome.metrics,
            )
        except LossworksError as error:
            self._watcher.say(f"{child.title}: its model can't be kept as a run: {error}")
        else:
            write_atomically(child.files.path / "model-run", child_id)

    def _finish(self, child: Child, child_id: str) -> None:
        from lossworks.tracking import finish_run

        outcome = child.outcome
        own = child.files
        files = (own.path / "spec.yaml", own.outcome, own.model, own.table, own.personalised)
        status = _STATUS[outcome.status if outcome else "stopped"]
        try:
            finish_run(
                self.spec.tracking,
                child_id,
                status,  # type: ignore[arg-type]
                artifacts=[file for file in files if file.is_file()],
                reason=outcome.reason if outcome else None,
            )
        except RunError as error:
            self._watcher.say(str(error))


def open_session(spec: FederationSpec, resume: RunFolder | None, watcher: FederationWatcher) -> Session:
    """Return the session of a new run, or of one to go on with, entered in MLflow.

    Raises:
        UserError: The store or the folder can't be used.
    """
    from lossworks.tracking import create_run, open_run

    if resume is not None:
        open_run(spec.tracking, resume.run_id)
        return Session(spec, resume, watcher)
    tags = {"lossworks.kind": "federation"}
    run_id = create_run(spec.tracking, name=spec.name, parameters=_parameters(spec), tags=tags)
    return Session(spec, RunFolder.create(spec, run_id), watcher)


def read_session_spec(folder: RunFolder) -> FederationSpec:
    """Return the spec of a federation's run.

    Raises:
        UserError: The run is no federation.
    """
    return FederationSpec.read(folder.spec_file)


def _parameters(spec: FederationSpec) -> dict[str, object]:
    flat = spec.flat()
    flat["strategies"] = ", ".join(strategy.title for strategy in spec.strategies)
    return flat


def _folder_name(index: int, strategy: StrategySpec, seed: int) -> str:
    # Hyperparameters may make two of a name; the number tells them apart, and a digest that it is the same.
    digest = hashlib.sha256(strategy.model_dump_json().encode()).hexdigest()[:6]
    return f"{index:02d}-{strategy.name}-{digest}-seed{seed}"


def finish_session(session: Session, artifacts: list[Path]) -> None:
    """Store a federation's artifacts and its status, the worst of its children's.

    Raises:
        RunError: The store is away.
    """
    from lossworks.tracking import finish_run

    statuses = [child.outcome.status if child.outcome else "stopped" for child in session.children]
    worst = next((status for status in ("stopped", "failed") if status in statuses), "finished")
    reasons = [f"{c.title}: {c.outcome.reason}" for c in session.children if c.outcome and c.outcome.reason]
    finish_run(
        session.spec.tracking,
        session.folder.run_id,
        _STATUS[worst],  # type: ignore[arg-type]
        artifacts=[session.folder.spec_file, *artifacts],
        tags={"lossworks.folder": str(session.folder.path)},
        reason="; ".join(reasons) or None,
    )
