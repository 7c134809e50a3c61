"""The summary that the command line prints at the end of a run."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def print_summary(
    title: str,
    rows: Sequence[tuple[str, str]],
    commands: Sequence[tuple[str, str]] = (),
    *,
    console: Console | None = None,
) -> None:
    """Print a panel with one line per fact and, below, the commands that make sense next.

    On a pipe or in a file the same is written as plain lines, with commands unbroken so that they can be
    copied.

    Args:
        title: Heading of the panel.
        rows: Label and value of each fact.
        commands: What a command does, and the command.
        console: Where to; standard output if unset.
    """
    console = console or Console()
    if not console.is_terminal:
        for label, value in ((title, ""), *rows, *commands):
            console.print(
                f"{label}: {value}" if value else label, markup=False, highlight=False, soft_wrap=True
            )
        return
    parts: list[RenderableType] = [_table(rows, "bold")]
    if commands:
        parts += [Text(), _table(commands, "cyan")]
    console.print(Panel(Group(*parts), title=Text(title, "bold"), title_align="left", expand=False))


def _table(rows: Sequence[tuple[str, str]], style: str) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        # Text takes brackets as they are; rich would read "[1]" in a path as markup.
        table.add_row(Text(label), Text(value, style))
    return table
