"""The ``lossworks`` command: finds the commands of the rooms and turns errors into one line.

A room adds a command with an entry point in the group ``lossworks.commands`` that names a ``Command``. The
modules that hold commands import little at their top, so that ``lossworks --help`` answers at once.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import NoReturn

from lossworks import __version__
from lossworks.errors import LossworksError, UserError, nearest
from lossworks.home import prepare_process

_GROUP = "lossworks.commands"


@dataclass(frozen=True)
class Command:
    """One command of the command line.

    Attributes:
        help: What it does, in one line.
        configure: Adds its arguments to a parser.
        run: Takes the parsed arguments and returns the exit status.
    """

    help: str
    configure: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 for a run that failed, 2 for bad input."""
    debug = bool(os.environ.get("LOSSWORKS_DEBUG"))
    prepare_process()
    try:
        parsed = _parser().parse_args(arguments)
        return int(parsed.run(parsed))
    except LossworksError as error:
        if debug:
            raise
        print(f"lossworks: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("lossworks: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as `head`, has gone; that is no error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="lossworks",
        description="Train, tune and federate with losses you can trust.",
        epilog="`lossworks COMMAND --help` says more. Files are kept in $LOSSWORKS_HOME, or ~/.lossworks. "
        "LOSSWORKS_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action="version", version=f"lossworks {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for point in sorted(entry_points(group=_GROUP), key=lambda point: point.name):
        command: Command = point.load()
        child = commands.add_parser(point.name, help=command.help, description=command.help)
        command.configure(child)
        child.set_defaults(run=command.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are printed like all others, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


class _CommandParser(_Parser):
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
    return "lossworks" if shutil.which("lossworks") or path.name != "lossworks" else str(path)


def require_one(given: str, known: Sequence[str], what: str) -> str:
    """Return ``given`` if it is one of ``known``.

    Raises:
        UserError: With the nearest of ``known``, or all of them.
    """
    if given in known:
        return given
    guess = nearest(given, known)
    hint = f"did you mean {guess}?" if guess else f"known: {', '.join(known)}"
    raise UserError(f"{given}: no such {what}; {hint}")
