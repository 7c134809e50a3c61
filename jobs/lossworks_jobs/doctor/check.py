"""What a check found."""

from dataclasses import dataclass
from typing import Literal

CheckStatus = Literal["ok", "warn", "wrong"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        area: What it belongs to: installation, computing, machine, files, Ray or MLflow.
        name: What was looked at.
        status: ``ok``; ``warn`` if runs work, but slower or not all of them; ``wrong`` if they fail.
        found: What was seen.
        fix: What to do about it, in one sentence; "" if and only if it is ok.
    """

    area: str
    name: str
    status: CheckStatus
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        """Hold the check to its promise.

        Raises:
            ValueError: Something is not ok and there is no fix, or the other way round.
        """
        if (self.status == "ok") == bool(self.fix):
            raise ValueError(f"{self.name}: a fix goes with what is not ok, and with nothing else")


@dataclass(frozen=True)
class Area:
    """Makes the checks of one area."""

    name: str

    def ok(self, name: str, found: str) -> Check:
        """Return that all is well."""
        return Check(self.name, name, "ok", found)

    def warn(self, name: str, found: str, fix: str) -> Check:
        """Return that runs work, but slower, less safely, or not all of them."""
        return Check(self.name, name, "warn", found, fix)

    def wrong(self, name: str, found: str, fix: str) -> Check:
        """Return that runs fail."""
        return Check(self.name, name, "wrong", found, fix)
