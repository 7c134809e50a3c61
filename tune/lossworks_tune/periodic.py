"""Something done again and again while something else runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(call: Callable[[], object], every_s: float = 1.0) -> Iterator[None]:
    """Call a function every so many seconds, in a thread, while a block runs, and once after it."""
    over = threading.Event()

    def loop() -> None:
        while not over.wait(every_s):
            call()

    thread = threading.Thread(target=loop, name="lossworks-periodic", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        call()
