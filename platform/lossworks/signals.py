"""Ctrl-C, SIGTERM and the terminal's end mean the same: stop, in good order."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec nothing may wait for a lock that another thread held.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@contextlib.contextmanager
def stop_signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt for SIGTERM, the notice before a machine goes away, as for Ctrl-C.

    So does SIGHUP, sent when a window or connection is closed, unless it is ignored, as under ``nohup``; what
    is printed afterwards goes nowhere. SIGINT is set, too: a shell that starts a script in the background has
    it ignored. Outside of the main thread, which alone gets signals, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [
        descriptor for descriptor in (1, 2) if os.isatty(descriptor)
    ]  # can't be asked once it is gone

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            # Printing to a terminal that is gone is an error, in the middle of whatever saves the run.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def hangups_ignored() -> Iterator[None]:
    """Have processes that are started meanwhile outlive the terminal: who started them ends them in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


def end_with_parent() -> None:
    """Have this process told to end when its parent's thread ends, however that is killed; on Linux alone.

    It is for ``subprocess.Popen(..., preexec_fn=end_with_parent)``, and for children that have a session of
    their own, which no signal to the parent's group reaches.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
