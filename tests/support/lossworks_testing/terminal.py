"""A process in a terminal of its own, whose window can be closed."""

import os
import pty
import select
import time
from collections.abc import Mapping, Sequence


class Terminal:
    """Runs a command in a new terminal.

    Args:
        command: Program and arguments.
        environment: All variables.

    Attributes:
        printed: What it has printed so far.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.printed = ""
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), dict(environment))  # noqa: S606

    def read_until(self, text: str, *, seconds: float = 120.0) -> None:
        """Read until it has printed a text."""
        deadline = time.monotonic() + seconds
        while text not in self.printed:
            ready, _, _ = select.select([self._terminal], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"waited {seconds:g} s for {text!r}; there is {self.printed!r}")
            self.printed += os.read(self._terminal, 4096).decode(errors="replace")

    def close(self, *, seconds: float = 120.0) -> int:
        """Close the window, wait for the process, and return its exit status."""
        os.close(self._terminal)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.05)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"it runs on {seconds:g} s after its terminal was closed")
