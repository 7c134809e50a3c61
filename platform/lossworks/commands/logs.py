"""``lossworks logs``: what the processes of a run have written, in order of time."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossworks.cli import Command
from lossworks.errors import UserError, require_one

_LEVELS = ("debug", "info", "warning", "error", "critical")
_LOOK_S = 0.5


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="id, beginning of an id, name, or folder of a run")
    parser.add_argument(
        "--rank", type=int, metavar="N", help="of one rank only; default: all, and the driver"
    )
    parser.add_argument(
        "--level", default="info", help=f"least severity: {', '.join(_LEVELS)} (default info)"
    )
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")


def _run(arguments: argparse.Namespace) -> int:
    from lossworks.logs import readable
    from lossworks.runs import RunFolder
    from lossworks.signals import stop_signals_interrupt

    least = _LEVELS.index(require_one(arguments.level.lower(), _LEVELS, "level"))
    folder = RunFolder.find(arguments.run_name)
    pattern = "*" if arguments.rank is None else f"rank-{arguments.rank}"
    reader = LogReader(folder.logs, pattern)
    if not reader.files() and not arguments.follow:
        raise UserError(f"run {folder.run_id}: there are no logs {folder.logs / pattern}.jsonl")
    with stop_signals_interrupt():
        try:
            while True:
                for line in reader.new():
                    if _severity(line) >= least:
                        print(readable(line), flush=arguments.follow)
                if not arguments.follow:
                    return 0
                time.sleep(_LOOK_S)
        except KeyboardInterrupt:
            return 0


class LogReader:
    """Reads the log files of a run, each line once.

    Args:
        folder: Where they are.
        pattern: Of their names, without the end.
    """

    def __init__(self, folder: Path, pattern: str = "*") -> None:
        self._folder, self._pattern = folder, pattern
        self._seen: dict[int, int] = {}  # bytes read, by a file's number, which it keeps when it is renamed

    def files(self) -> list[Path]:
        """Return the files, the older part of each first."""
        return [
            path for end in (".jsonl.1", ".jsonl") for path in sorted(self._folder.glob(self._pattern + end))
        ]

    def new(self) -> list[dict[str, Any]]:
        """Return what was written since the last call, in order of time; torn lines are left out."""
        lines = [line for path in self.files() for line in self._read(path)]
        return sorted(lines, key=lambda line: str(line.get("time")))

    def _read(self, path: Path) -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            file.seek(self._seen.get(number, 0))
            for text in file:
                if not text.endswith(b"\n"):
                    break  # is still being written
                self._seen[number] = self._seen.get(number, 0) + len(text)
                try:
                    line = json.loads(text)
                except ValueError:
                    continue  # a full disk took a part of it
                if isinstance(line, dict):
                    yield line


def _severity(line: dict[str, Any]) -> int:
    level = str(line.get("level")).lower()
    return _LEVELS.index(level) if level in _LEVELS else len(_LEVELS)


LOGS = Command("print what the workers and the driver of a run have logged", _configure, _run)
