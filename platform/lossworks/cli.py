"""The ``lossworks`` command: finds the commands of the rooms and turns errors into one line.

A room adds a command with an entry point in the group ``lossworks.commands`` that names a ``Command``. The
modules that hold commands import little at their top, so that ``lossworks --help`` answers at once.
"""

import argparse
import errno
import io
import os
import shlex
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from lossworks import __version__
from lossworks.errors import LossworksError, UserError, printable, require_one, shortened
from lossworks.home import home, prepare_process

_GROUP = "lossworks.commands"
_EXTRAS = {"ray": "jobs", "optuna": "tune", "flwr": "federated", "transformers": "hf", "datasets": "hf"}
"""Which part of Lossworks brings a library that is not always there."""


Group = Literal[
    "train and search", "your own data", "what was trained", "the catalogue", "machines and servers"
]


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        help: What it does, in one line.
        configure: Adds its arguments to a parser.
        run: Takes the parsed arguments and returns the exit status.
        group: Below which heading ``lossworks --help`` lists it.
    """

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    group: Group = "what was trained"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a run that failed, 2 for bad input."""
    debug = bool(os.environ.get("LOSSWORKS_DEBUG"))
    prepare_process()
    _prepare_streams()
    try:
        given = list(sys.argv[1:] if arguments is None else arguments)
        known = commands()
        if given and not given[0].startswith("-"):
            require_one(given[0], sorted(known), "command")
        parsed = parser_of(known).parse_args(given)
        return int(parsed.run(parsed))
    except LossworksError as error:
        if debug:
            raise
        print(f"lossworks: error: {printable(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("lossworks: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # whatever nobody foresaw is a line for a person, and a file for us
        if debug:
            raise
        missing = _missing_extra(error)
        text = missing or _refused_by_storage(error) or _unforeseen(error)
        print(f"lossworks: error: {printable(text)}", file=sys.stderr)
        return 2 if missing else 1


def _prepare_streams() -> None:
    """Have a terminal without ±, or a shell that closed our output, end no hours of work."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _missing_extra(error: Exception) -> str:
    """Return what to install where a library is missing that a part of Lossworks brings, or nothing."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return ""
    extra = _EXTRAS.get(error.name.partition(".")[0])
    return f"this needs {error.name}: pip install 'lossworks[{extra}]'" if extra else ""


def _refused_by_storage(error: BaseException | None) -> str:
    """Return what a disk says that is full, or takes nothing, if that led to an error; else nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            where = error.filename or f"what is written to, or {home()}"
            return (
                f"{where}: {error.strerror}; what was saved before stays. Make room, or set LOSSWORKS_HOME "
                "to another disk; --resume goes on with a run"
            )
        error = error.__cause__ or error.__context__
    return ""


def _unforeseen(error: Exception) -> str:
    """Return one line about an error that nothing foresaw, and keep its traceback in a file."""
    line = " ".join(f"{type(error).__name__}: {error}".split())
    text = f"this is a mistake of Lossworks, not yours: {shortened(line, 300)}"
    try:
        folder = home() / "errors"
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8", errors="replace")
    except (OSError, LossworksError):
        return f"{text}; LOSSWORKS_DEBUG=1 shows where"
    return f"{text}; what led to it is in {file}. Runs keep their checkpoints: --resume goes on with them"


def commands() -> dict[str, Command]:
    """Return the commands of all rooms that are installed, by name."""
    return {point.name: point.load() for point in entry_points(group=_GROUP)}


def parser_of(commands: Mapping[str, Command], *, listed: bool = False) -> "CommandLineParser":
    """Return the parser of the whole command line.

    Args:
        commands: By name.
        listed: Whether argparse lists them, too; for people they are in the description, by groups.
    """
    parser = CommandLineParser(
        prog="lossworks",
        usage="lossworks [-h] [--version] COMMAND ...",
        description=f"Train, tune and federate with losses you can trust.\n\n{_listed(commands)}",
        epilog="`lossworks COMMAND --help` says more. Files are kept in $LOSSWORKS_HOME, or ~/.lossworks.\n"
        "LOSSWORKS_DEBUG=1 shows tracebacks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lossworks {__version__}")
    shown = None if listed else argparse.SUPPRESS
    children = parser.add_subparsers(
        metavar="COMMAND", required=True, help=shown, parser_class=_CommandParser
    )
    for name, command in sorted(commands.items()):
        own: dict[str, Any] = {"help": command.help} if listed else {}  # without one argparse lists nothing
        child = children.add_parser(name, prog=f"lossworks {name}", description=command.help, **own)
        command.configure(child)
        child.set_defaults(run=command.run)
        parser.taken += child.taken
    return parser


def _listed(commands: Mapping[str, Command]) -> str:
    """Return all commands below the headings of their groups, none wider than a narrow terminal."""
    width = max(map(len, commands))
    lines = []
    for group in get_args(Group):
        lines += ["", f"{group}:"]
        for name in sorted(name for name, command in commands.items() if command.group == group):
            indent = " " * (width + 4)
            lines += textwrap.wrap(
                commands[name].help, 78, initial_indent=f"  {name:{width}}  ", subsequent_indent=indent
            )
    return "\n".join(lines[1:])


class CommandLineParser(argparse.ArgumentParser):
    """A parser whose errors are printed like all others, in one line.

    Attributes:
        taken: The arguments that it and its commands take.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.taken: list[argparse.Action] = []
        super().__init__(*args, **kwargs)

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        """Add an argument, and keep it in ``taken``."""
        self.taken.append(super().add_argument(*args, **kwargs))
        return self.taken[-1]

    def error(self, message: str) -> NoReturn:
        """Refuse what was typed.

        Raises:
            UserError: In one line.
        """
        raise UserError(f"{message}; see `{self.prog} --help`")


class _CommandParser(CommandLineParser):
    """A parser of one command, which takes overrides and options in any order."""

    _intermixing = False

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse with positionals between options; argparse would take none after the first option."""
        if self._intermixing:  # the intermixed parse is built on this very method
            return super().parse_known_args(args, namespace)
        self._intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixing = False


def program() -> str:
    """Return how this user can call the command: by name, or by its path where that is not on PATH."""
    path = Path(sys.argv[0])
    return "lossworks" if shutil.which("lossworks") or path.name != "lossworks" else shlex.quote(str(path))
