"""`lossworks specs`: the specs that come with the installation, to begin from."""

import argparse
from pathlib import Path

from lossworks.cli import Command
from lossworks.errors import UserError


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "A command takes their names, too: `lossworks train demo`."
    parser.add_argument("name", nargs="?", metavar="NAME", help="print one of them")
    parser.add_argument("--to", metavar="FILE", help="write it there instead, to be changed")


def _run(arguments: argparse.Namespace) -> int:
    from lossworks.specs.shipped import shipped_specs, spec_file

    if arguments.name is None:
        if arguments.to:
            raise UserError(f"--to {arguments.to}: say which spec is to be written there")
        _print_all(shipped_specs())
        return 0
    file = spec_file(arguments.name)
    if not file.is_file():
        raise UserError(f"{arguments.name}: no such spec; there are {', '.join(shipped_specs())}")
    text = file.read_text(encoding="utf-8")
    if arguments.to is None:
        print(text, end="")
        return 0
    target = Path(arguments.to)
    try:
        with target.open("x", encoding="utf-8") as written:
            written.write(text)
    except OSError as error:
        raise UserError(f"--to {target}: can't be written: {error.strerror}") from None
    print(f"{target}: a copy of {file.name}")
    return 0


def _print_all(specs: dict[str, Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    from lossworks.specs.base import command_of, read_yaml

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("command and spec", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for place, file in specs.items():
        command = command_of(read_yaml(file))
        table.add_row(f"{command} {place}", _first_sentence(file.read_text(encoding="utf-8")))
    console = Console()
    console.print(table, highlight=False)
    console.print(
        "`lossworks specs NAME --to my.yaml` writes one to be changed.", style="dim", highlight=False
    )


def _first_sentence(text: str) -> str:
    """Return the first sentence of the comment at a spec's top."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    sentence, stop, _ = " ".join(lines).partition(". ")
    return sentence + (stop.strip() if stop else "")


SPECS = Command(
    "specs that come with Lossworks, to begin from: a list, or one of them",
    _configure,
    _run,
    group="train and search",
)
