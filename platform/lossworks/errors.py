"""The errors that Lossworks raises on purpose.

Whatever a user can cause is a ``UserError``: its message names the setting, the value and what would be
right, and the command line prints it as one line with exit status 2. A run that started and could not go
on raises a ``RunError`` (exit status 1).
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any


class LossworksError(Exception):
    """Base of all errors raised on purpose; its message is meant for a person."""


class UserError(LossworksError, ValueError):
    """Something the caller gave can't be used; nothing was started."""


class RunError(LossworksError, RuntimeError):
    """A run that had started could not go on."""


class NonFiniteLossError(RunError):
    """A loss or gradient became NaN or infinite.

    Attributes:
        step: The optimiser step, counted from 1, at which it was seen.
        ranks: The ranks that saw it.
    """

    def __init__(self, message: str, *, step: int, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.step = step
        self.ranks = ranks

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way from a worker process to the driver."""
        return (_rebuild_non_finite, (str(self), self.step, self.ranks))


class LossSpikesError(RunError):
    """The loss was a spike more times in a row than a run leaves out; all its ranks raise it alike.

    Attributes:
        step: The optimiser step, counted from 1, at which it was seen.
    """

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step


class StorageError(RunError):
    """Storage refused for longer than a run waits; all its ranks raise it alike."""


def _rebuild_non_finite(message: str, step: int, ranks: tuple[int, ...]) -> NonFiniteLossError:
    return NonFiniteLossError(message, step=step, ranks=ranks)


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name most like ``name``, or None when none is alike by more than ``cutoff`` of 1."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


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


def shortened(text: str, most: int = 200) -> str:
    """Return a text of a message, cut where it is long."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def printable(text: str) -> str:
    """Return a text in which characters that would steer a terminal are written as escapes."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text.encode("utf-8", "backslashreplace").decode()
    )


def redact(text: str) -> str:
    """Return a text with ``user:password@`` in every address replaced by ``***@``."""
    # A slash ends the part before the host, but people write passwords into these addresses as they are.
    return re.sub(r"(?<=http://)\S*@|(?<=https://)\S*@|(?<=s3://)\S*@|(?<=://)[^\s/]*@", "***@", text)
