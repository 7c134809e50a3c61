"""`lossworks completion`: what a shell needs to complete commands, options and files."""

import argparse

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
    for action in parser.taken:
        if any(part in _FILES for part in str(action.metavar).split("|")):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
    return 0


COMPLETION = Command(
    "print what completes commands, options and files in a shell", _configure, _run, "machines and servers"
)
