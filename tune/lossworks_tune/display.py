"""What a person sees while something runs: a picture of it in a terminal, lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

_LINE_EVERY_S = 10.0


class LiveDisplay:
    """Shows how something stands, renewed in place; on a pipe, a line every ten seconds. A context manager.

    Args:
        console: Where to; standard output if unset.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._began = time.monotonic()
        self._last_line = -_LINE_EVERY_S

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(Text("starting"), console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, phase: str, status: str, line: str, render: Callable[[str], RenderableType]) -> None:
        """Show how it stands.

        Args:
            phase: What is being done.
            status: How far it is.
            line: What a line on a pipe says further; may be empty.
            render: Returns what a terminal shows, given its title.
        """
        seconds = time.monotonic() - self._began
        title = f"{phase}, {seconds:.0f} s: {status}"
        if self._live is not None:
            self._live.update(render(title), refresh=True)
        elif seconds - self._last_line >= _LINE_EVERY_S:
            self._last_line = seconds
            self.message(title + (f"; {line}" if line else ""))

    def message(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
