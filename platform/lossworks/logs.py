"""The logs of a run: one JSON line per event, written by every rank and read by ``lossworks logs``.

Whatever logs to ``logging.getLogger("lossworks...")`` ends up there once :func:`writing_logs` is in force;
without it events go nowhere, and warnings where Python's ``logging`` sends them.
"""

import contextlib
import json
import logging
import math
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from lossworks.errors import redact

EVENTS = logging.getLogger("lossworks.run")
"""Where the training loop says what happens."""

EVENTS.addHandler(logging.NullHandler())  # or Python would print warnings of runs that nobody logs

_SECRET_NAMES = ("PASSWORD", "TOKEN", "SECRET", "KEY")
_SHORTEST_SECRET = 6
_MOST_BYTES = 4 * 2**20  # of a file; one older file is kept beside it


def fields(**values: Any) -> dict[str, dict[str, Any]]:
    """Return values as the ``extra`` of a call of ``logging``, which become keys of the JSON line."""
    return {"fields": values}


@contextlib.contextmanager
def writing_logs(folder: Path, *, run: str, who: int | str, echo: bool = False) -> Iterator[None]:
    """Write what happens inside to a file of ``folder``, a JSON line each.

    A file holds 4 MiB at most, and one older file is kept. A disk that is full, or a folder that can't be
    written, loses lines and no run.

    Args:
        folder: Made if it doesn't exist.
        run: Id of the run.
        who: A rank, or the name of another process, such as ``driver``.
        echo: Also write plain lines to standard error, where Ray's pages of a worker's log show them.
    """
    rank = who if isinstance(who, int) else None
    formatter = JsonLines(run, rank, Secrets.of(os.environ))
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if echo else []
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{who}.jsonl" if rank is not None else f"{who}.jsonl"
        handlers.append(_Quiet(folder / name, maxBytes=_MOST_BYTES, backupCount=1, encoding="utf-8"))
    logger = logging.getLogger("lossworks")
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        handler.setFormatter(formatter if isinstance(handler, _Quiet) else PlainLines(formatter))
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # what is left in a buffer may not fit on the disk
                handler.close()


class Secrets:
    """Takes secrets out of texts: user and password of addresses, and the values given.

    Args:
        values: Replaced wherever they occur.
    """

    def __init__(self, values: list[str]) -> None:
        self._values = sorted(values, key=len, reverse=True)  # one may be part of another

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Secrets":
        """Return what knows the values of variables called …PASSWORD, …TOKEN, …SECRET or …KEY.

        Values of fewer than 6 characters stay: words of a message would go with them.
        """
        named = (value for name, value in environment.items() if name.upper().endswith(_SECRET_NAMES))
        return cls([value for value in named if len(value) >= _SHORTEST_SECRET])

    def hide(self, value: Any) -> Any:
        """Return plain data without secrets; what JSON can't hold becomes text."""
        if isinstance(value, Mapping):
            return {self._text(str(key)): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        if isinstance(value, bool | int) or value is None:
            return value
        if isinstance(value, float) and math.isfinite(value):
            return value
        return self._text(str(value))

    def _text(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "***")
        return redact(text)


class JsonLines(logging.Formatter):
    """Formats a record as JSON: time (ISO 8601, UTC), level, run, rank, host, step, message, and its fields.

    Args:
        run: Id of the run.
        rank: Of the process; None where it has none.
        secrets: Taken out of everything.
    """

    def __init__(self, run: str, rank: int | None, secrets: Secrets) -> None:
        super().__init__()
        self._fixed = {"run": run, "rank": rank, "host": socket.gethostname()}
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        return json.dumps(self.plain(record), ensure_ascii=False, allow_nan=False)

    def plain(self, record: logging.LogRecord) -> dict[str, Any]:
        """Return the record as plain data without secrets."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            **self._fixed,
            "step": None,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            values["error"] = self.formatException(record.exc_info)
        found: dict[str, Any] = self._secrets.hide(values)
        return found


class PlainLines(logging.Formatter):
    """Formats a record for a person.

    Args:
        lines: Says what is in it.
    """

    def __init__(self, lines: JsonLines) -> None:
        super().__init__()
        self._lines = lines

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, or several with an error."""
        return readable(self._lines.plain(record))


def readable(line: Mapping[str, Any]) -> str:
    """Return a record of a log as a person reads it: time, level, rank, step, message and its fields."""
    known = ("time", "level", "run", "rank", "host", "step", "message", "error")
    who = "driver" if line.get("rank") is None else f"rank {line['rank']}"
    step = "" if line.get("step") is None else f" step {line['step']}:"
    rest = "".join(f" {key}={_short(value)}" for key, value in line.items() if key not in known)
    error = f"\n{line['error']}" if line.get("error") else ""
    return f"{line.get('time')} {line.get('level', ''):<7} {who}:{step} {line.get('message')}{rest}{error}"


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


class _Quiet(RotatingFileHandler):
    """A file that loses lines rather than raising or printing an error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (the name is logging's)
        """Go on: a full disk must not end a run."""
        del record
