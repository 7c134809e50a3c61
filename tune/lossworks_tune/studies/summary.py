"""What a person sees of a study: a live table, and at the end means, differences and verdicts."""

from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from lossworks.cli import program
from lossworks.reporting import print_summary
from lossworks.tracking import redact, tracking_uri
from lossworks_tune.display import LiveDisplay
from lossworks_tune.studies import shipped
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.page import stored
from lossworks_tune.studies.run import StudyListener, StudyResult
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.tables import EXPLANATION, Table, failures, of_verdict, tables

_WIDTH_OF_FILES = 150
_STYLES = {"confirmed": "green", "contradicted": "red", "not told apart": "yellow"}


class StudyDisplay(LiveDisplay, StudyListener):
    """Shows means as far as they are known while the rest trains."""

    def update(self, outcome: StudyOutcome) -> None:
        """Show how it stands."""
        count, failed = len(outcome.results), len(outcome.failures)
        status = f"{count} of {len(outcome.plan.trainings)} trainings have ended"
        status += f", {failed} failed" if failed else ""
        self.show("training", status, "", lambda title: Group(Text(title), *rendered(outcome)))


def rendered(outcome: StudyOutcome) -> list[RenderableType]:
    """Return a study's tables for a terminal."""
    return [_rendered(table) for table in tables(outcome)]


def _rendered(table: Table) -> RichTable:
    found = RichTable(title=table.title or None, title_justify="left")
    found.add_column("variant", overflow="fold")
    for column in table.columns:
        found.add_column(column, justify="right")
    # Differences stand below means where there is no room beside them.
    before = "\n(" if len(table.columns) > 2 else " ("
    for name, *cells in table.rows:
        found.add_row(Text(name), *(cell.replace(" (", before) for cell in cells))
    return found


def show(result: StudyResult) -> None:
    """Print the tables, the verdicts, where everything is, and what to do next."""
    outcome, console = result.outcome, Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH_OF_FILES)
    if outcome.spec.claim:
        console.print(Text(outcome.spec.claim, "italic"))
    for table in rendered(outcome):
        console.print(table)
    console.print(Text(EXPLANATION, "dim"))
    for verdict in outcome.verdicts:
        console.print(Text(f"{verdict.word}: {of_verdict(verdict)}", _STYLES[verdict.word]))
    uri = tracking_uri(outcome.spec.tracking)
    commands = [("see the runs in MLflow", redact(uri) if uri.startswith("http") else f"{program()} ui")]
    print_summary(outcome.spec.name, _facts(result), commands)


def print_studies() -> None:
    """Print the studies that come with Lossworks: name, claim, and the verdict that is kept."""
    kept = dict(stored())
    table = RichTable("study", "claim", "verdict", box=None, header_style="bold")
    for name, file in shipped.files().items():
        verdict = kept[name].word if name in kept else None
        table.add_row(name, StudySpec.read(file).claim, Text(verdict or "–", _STYLES.get(verdict or "", "")))
    console = Console()
    console.print(table if table.rows else "no study comes with this installation")


def _facts(result: StudyResult) -> list[tuple[str, str]]:
    outcome = result.outcome
    verdict: str = outcome.word or "none, since nothing was expected (expect)"
    facts = [("verdict", verdict)]
    facts += [("note", note) for note in outcome.plan.notes]
    if text := failures(outcome):
        facts.append(("failed", text))
    files = ", ".join(path.name for path in (result.document, *result.pictures))
    return [*facts, ("files", files), ("folder", str(result.folder.path))]
