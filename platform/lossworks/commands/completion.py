"""`lossworks completion`: what a shell needs to complete commands, options and files."""

import argparse
from collections.abc import Iterator

from lossworks.cli import Command, commands, parser_of

_SHELLS = ("bash", "zsh")
_FILES = ("SPEC", "STUDY", "FILE", "DIR", "INPUT", "OUTPUT")  # how what names a file is called in help


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        'bash: eval "$(lossworks completion bash)" in ~/.bashrc\n'
        'zsh:  eval "$(lossworks completion zsh)" in ~/.zshrc, after compinit'
    )
    parser.add_argument("shell", choices=_SHELLS, help="whose completion is printed")


def _run(arguments: argparse.Namespace) -> int:
    import shtab

    parser = parser_of(commands(), listed=True)
    for action in _actions(parser):
        if any(part in _FILES for part in str(action.metavar).split("|")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield what a parser takes, and what those of its commands take."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)
        else:
            yield action


COMPLETION = Command(
    "print what completes commands, options and files in a shell", _configure, _run, "machines and servers"
)
