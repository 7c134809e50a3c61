"""Ctrl-C and SIGTERM mean the same: stop, in good order."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM, the notice before a machine goes away, as for Ctrl-C.

    SIGINT is set, too: a shell that starts a script in the background has it ignored. Outside of the main
    thread, which alone gets signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
