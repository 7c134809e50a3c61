"""``federate(spec)``: strategies compared over seeds, tracked in MLflow."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.errors import RunError, UserError
from lossworks.lost_runs import watched
from lossworks.runs import RunFolder
from lossworks.specs.files import located
from lossworks_federated.reporting.comparison import Comparison, compare
from lossworks_federated.reporting.yardstick import Yardstick
from lossworks_federated.server.participants import participants_of
from lossworks_federated.server.session import (
    FederationWatcher,
    Session,
    finish_session,
    open_session,
    read_session_spec,
)
from lossworks_federated.specs import FederationSpec

if TYPE_CHECKING:
    from flwr.serverapp import Grid


_WORST = 5  # clients that are named


@dataclass(frozen=True)
class FederationResult:
    """A federation that has ended.

    Attributes:
        folder: Its folder, named after its id in MLflow.
        comparison: Figures of every strategy.
        pictures: What was drawn.
        failed: Titles of the children that failed, with the reason.
        worst: By title of the strategy, the worst clients of the first seed with their mean figures over
            their last 10 tests, the worst first.
        models: By title of the strategy, the run that its global model was made one of, of the first seed.
    """

    folder: RunFolder
    comparison: Comparison
    pictures: tuple[Path, ...]
    failed: tuple[tuple[str, str], ...]
    worst: dict[str, list[tuple[int, float]]]
    models: dict[str, str]


def federate(
    spec: FederationSpec,
    *,
    resume: RunFolder | None = None,
    watcher: FederationWatcher | None = None,
    grid: "Grid | None" = None,
) -> FederationResult:
    """Run a federation as ``spec`` says, or go on with one, and return how it ended.

    Args:
        spec: The federation.
        resume: Go on with this run: what finished is kept, the rest goes on from the last saved round.
        watcher: Receives its progress.
        grid: Of a deployed federation, in place of the spec's engine.

    Raises:
        UserError: Something in the spec can't work; no client was started.
        RunError: The engine failed. A strategy that fails is in the result instead.
    """
    from lossworks.tracking import check_tracking

    logging.getLogger("flwr").setLevel(logging.ERROR)
    watcher = watcher or FederationWatcher()
    spec = located(spec)
    if grid is not None:
        _require_deployable(spec)
    check_tracking(spec.tracking)
    RunFolder.check_storage(spec)
    # Data, split and models are made once before anything is entered anywhere, to see that they can be.
    participants_of(spec).check(deployed=grid is not None)
    session = open_session(spec, resume, watcher)
    with session.folder.hold(), watched(session.folder):
        try:
            _run(session, grid)
        finally:
            pictures = draw_federation(session)
            try:
                finish_session(session, [*pictures, session.folder.path / "comparison.csv"])
            except RunError as error:
                watcher.say(str(error))
    return _result(session, pictures)


def _require_deployable(spec: FederationSpec) -> None:
    from lossworks_federated.strategies.catalogue import ASYNCHRONOUS, declaration

    for strategy in spec.strategies:
        if ASYNCHRONOUS in declaration(strategy.name).flags:
            raise UserError(
                f"strategies: {strategy.name}: clients of a deployed federation arrive in real time, and it "
                "takes them in in virtual time; use engine=cohort"
            )


def result_of(folder: RunFolder) -> FederationResult:
    """Return the result of a run that has ended, from its folder."""
    session = Session(read_session_spec(folder), folder, FederationWatcher())
    return _result(session, sorted(folder.path.glob("*.png")))


def _result(session: Session, pictures: list[Path]) -> FederationResult:
    from lossworks_federated.reporting.client_figures import ClientFigures

    ended = [(child, child.outcome) for child in session.children]
    failed = tuple((child.title, end.reason) for child, end in ended if end and end.status == "failed")
    first = [child for child in session.children if child.seed == session.spec.seeds[0]]
    what = Yardstick.of(session.spec)
    found = {
        child.strategy.title: ClientFigures.read(child.files.table, what).worst(_WORST) for child in first
    }
    worst = {title: clients for title, clients in found.items() if clients}
    models = {child.strategy.title: run for child in first if (run := child.model_run) is not None}
    return FederationResult(session.folder, compare(session), tuple(pictures), failed, worst, models)


def _run(session: Session, grid: "Grid | None") -> None:
    spec, state = session.spec, session.folder.path / "clients"
    if all(child.outcome and child.outcome.status == "finished" for child in session.children):
        return
    if grid is not None:
        session.participants.prepare(grid, session.folder.path)
        session.run(lambda _child: grid)
        return
    if spec.engine == "flower":
        from lossworks_federated.engines.simulation import simulate

        simulate(spec, session.participants.app(state), lambda grid: session.run(lambda _child: grid))
        return
    session.run(lambda child: session.participants.grid(child.strategy, child.seed, state))


def draw_federation(session: Session) -> list[Path]:
    """Draw the comparison, and of each seed the split and clients over rounds; return what was drawn."""
    from lossworks_federated.reporting.client_figures import ClientFigures
    from lossworks_federated.reporting.client_heat_map import draw_client_heat_map
    from lossworks_federated.reporting.comparison_picture import draw_comparison
    from lossworks_federated.reporting.split_picture import draw_split

    comparison, what = compare(session), Yardstick.of(session.spec)
    comparison.write_csv(session.folder.path / "comparison.csv")
    pictures = []
    if comparison.entries:
        path = session.folder.path / "comparison.png"
        pictures += draw_comparison(comparison, path, title=session.spec.name)
    for seed in session.spec.seeds:
        child = next(child for child in session.children if child.seed == seed)
        setup = session.setup(child)
        if setup is not None and child.files.journal.is_file():
            path = session.folder.path / f"split-seed{seed}.png"
            title = f"{session.spec.name}, seed {seed}: {session.spec.split.kind}"
            pictures.append(draw_split(setup.split, path, title=title, names=setup.kind.class_names()))
        own = [child for child in session.children if child.seed == seed]
        found = {child.strategy.title: ClientFigures.read(child.files.table, what) for child in own}
        tested = {title: figures for title, figures in found.items() if len(figures.values)}
        if tested:
            path = session.folder.path / f"clients-seed{seed}.png"
            title = f"{session.spec.name}, seed {seed}: clients' {what.words} over rounds"
            pictures += draw_client_heat_map(tested, path, title=title)
    return pictures
