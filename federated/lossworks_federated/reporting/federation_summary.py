"""What a person sees of a federation: progress while it runs, a table at the end."""

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lossworks.cli import program
from lossworks.reporting import TrainProgress, print_summary
from lossworks.tracking import JournalRow, redact, tracking_uri
from lossworks_federated.federate import FederationResult
from lossworks_federated.reporting.comparison import Comparison
from lossworks_federated.server.session import Child, FederationWatcher
from lossworks_federated.specs import FederationSpec

_WIDTH_OF_FILES = 190
_MIB = 2.0**20
_Column = tuple[str, Callable[[str], str]]


class FederationDisplay(FederationWatcher):
    """Shows each child's rounds; a context manager.

    Args:
        rounds: Of each child.
        console: Where to; standard output if unset.
    """

    def __init__(self, rounds: int, console: Console | None = None) -> None:
        self._rounds, self._console = rounds, console or Console()
        self._progress: TrainProgress | None = None
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def begin(self, child: Child, number: int, of: int, done: int) -> None:
        """Name the child and start its bar."""
        after = f", going on after round {done}" if done else ""
        self.say(f"{child.title} ({number} of {of}){after}")
        self._progress = TrainProgress(self._rounds, first_step=done, console=self._console, unit="round")
        self._progress.__enter__()

    def row(self, row: JournalRow) -> None:
        """Show the round of a journal's row on the progress bar."""
        if self._progress is not None and row["step"] > 0:
            self._progress.update(row)

    def end(self, child: Child) -> None:
        """Close the bar; say why clients were not trained all at once, and what else is noted."""
        self._close()
        outcome = child.outcome
        if outcome is None:
            return
        if outcome.obstacle:
            self.say(f"clients were not trained all at once: {outcome.obstacle}")
        for note in outcome.notes:
            self.say(note)

    def say(self, text: str) -> None:
        """Print a sentence above the progress bar, once however many strategies and seeds it holds for."""
        if text in self._said:
            return
        self._said.add(text)
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)
            self._progress = None


def print_federation(spec: FederationSpec, result: FederationResult, *, where: str | None = None) -> None:
    """Print the comparison, where everything is, and what to do next.

    Args:
        spec: The federation.
        result: How it ended.
        where: What it ran on; the spec's engine if unset.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    console.print(_table(result.comparison, spec))
    if result.comparison.personalised:
        console.print(_personal_table(result.comparison, spec.measure.personalise or 0))
    of_seed = f", seed {spec.seeds[0]}" if len(spec.seeds) > 1 else ""
    lines = [("pictures", ", ".join(str(path) for path in result.pictures if path.suffix == ".png"))]
    lines += [(f"worst clients{of_seed}", f"{title}: {_named(who)}") for title, who in result.worst.items()]
    lines += [("failed", f"{title}: {reason}") for title, reason in result.failed]
    if result.models:
        named = ", ".join(f"{title}: {run}" for title, run in result.models.items())
        lines.append((f"models, as runs{of_seed}", named))
    uri = tracking_uri(spec.tracking)
    look = redact(uri) if uri.startswith("http") else f"{program()} ui"
    again = f"{program()} federate --resume {result.folder.run_id}"
    commands = [("see the runs in MLflow", look), *([("try again", again)] if result.failed else [])]
    if result.models:
        commands.append(
            ("write a model", f"{program()} export {next(iter(result.models.values()))} --to model")
        )
    print_summary(f"{spec.name}: {spec.rounds} rounds, {where or f'engine {spec.engine}'}", lines, commands)


def _named(clients: list[tuple[int, float]]) -> str:
    """Return clients with their figures in words."""
    return ", ".join(f"{client} ({figure:.2f})" for client, figure in clients)


def _table(comparison: Comparison, spec: FederationSpec) -> Table:
    seeds = len(spec.seeds)
    many = f"over {seeds} seeds ± 95 % interval" if seeds > 1 else "of one seed, so no intervals"
    title = f"means of the last 10 measured rounds, {many}; differences are paired by seed"
    table = Table(title=title, title_justify="left")
    table.add_column("strategy", overflow="fold")
    what, base = comparison.yardstick, next(iter(comparison.strategies), "")
    columns: list[_Column] = [
        (f"held-out {what.words}", lambda name: _mean(comparison, name, what.name, "{:.4f}")),
        (f"less {base}'s", lambda name: _difference(comparison, name)),
        ("last round", lambda name: _mean(comparison, name, "last", "{:.4f}")),
        ("best round", lambda name: _mean(comparison, name, "best", "{:.4f}")),
        (f"clients' {what.words}", lambda name: _mean(comparison, name, "clients", "{:.4f}")),
        ("worst tenth", lambda name: _mean(comparison, name, "worst10", "{:.4f}")),
    ]
    if comparison.target is not None:
        columns.append((f"rounds to {comparison.target:g}", comparison.reached))
        columns.append(("MiB to it", lambda name: _mean(comparison, name, "bytes_to_target", "{:.1f}", _MIB)))
        if comparison.timed:
            columns.append(
                ("virtual s to it", lambda name: _mean(comparison, name, "virtual_to_target", "{:.4g}"))
            )
    if comparison.timed:
        columns.append(("virtual s", lambda name: _mean(comparison, name, "virtual_seconds", "{:.4g}")))
    columns += [
        ("MiB sent", lambda name: _mean(comparison, name, "bytes", "{:.1f}", _MIB)),
        ("left out", lambda name: _mean(comparison, name, "left_out", "{:.0f}")),
        ("s a round", lambda name: _mean(comparison, name, "seconds_per_round", "{:.3f}")),
    ]
    if spec.privacy.noisy:
        heading = f"ε at δ = {spec.privacy.delta:g}"
        columns.append((heading, lambda name: _mean(comparison, name, "epsilon", "{:.4g}")))
    return _filled(table, columns, comparison)


def _personal_table(comparison: Comparison, epochs: int) -> Table:
    title = f"the last model, fine-tuned by each client for {epochs} epoch{'s' if epochs > 1 else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("strategy", overflow="fold")
    columns: list[_Column] = [
        (
            f"clients' {comparison.yardstick.words}",
            lambda name: _mean(comparison, name, "personal", "{:.4f}"),
        ),
        ("worst tenth", lambda name: _mean(comparison, name, "personal_worst10", "{:.4f}")),
        ("change", lambda name: _mean(comparison, name, "gain", "{:+.4f}")),
        ("clients helped", lambda name: _mean(comparison, name, "helped", "{:.0f}")),
        ("hurt", lambda name: _mean(comparison, name, "hurt", "{:.0f}")),
    ]
    return _filled(table, columns, comparison)


def _filled(table: Table, columns: Sequence[_Column], comparison: Comparison) -> Table:
    """Return a table with its columns, and a row a strategy."""
    for heading, _ in columns:
        table.add_column(heading, justify="right")
    for name in comparison.strategies:
        table.add_row(Text(name), *(cell(name) for _, cell in columns))
    return table


def _difference(comparison: Comparison, name: str) -> str:
    found = comparison.difference(name)
    if found is None or name == comparison.strategies[0]:
        return "–"
    shown = f"{found.value:+.4f}"
    return shown if found.half_width is None else f"{shown} ± {found.half_width:.4f}"


def _mean(comparison: Comparison, name: str, figure: str, form: str, unit: float = 1.0) -> str:
    found = comparison.mean(name, figure)
    if found is None:
        return "–"
    # Seconds and bytes of runs are no sample of anything: their interval says nothing.
    shown = form.format(found.value / unit)
    of_clients = ("clients", "worst10", "personal", "personal_worst10")
    sampled = (comparison.yardstick.name, "last", "best", *of_clients)
    told = figure in sampled and found.half_width is not None
    return f"{shown} ± {form.format(found.half_width)}" if told else shown
