"""Ctrl-C and SIGTERM: the first asks the run to save and end, the second ends it at once."""

import threading
from collections.abc import Callable
from pathlib import Path

from lossworks.signals import stop_signals_interrupt


def run_until_done(
    work: Callable[[], None],
    *,
    stop_file: Path,
    say: Callable[[str], None],
    look: Callable[[], None],
) -> None:
    """Run ``work`` in a thread and turn the first signal into a stop file.

    Ray's own handler, which it sets when ``fit`` is called in the main thread, would kill the workers.

    Args:
        work: Raises what ``run_until_done`` then raises.
        stop_file: The training loop looks for it after every step.
        say: Called with a sentence for the user.
        look: Called several times a second meanwhile, and once at the end.

    Raises:
        KeyboardInterrupt: At the second signal.
    """
    failure: list[BaseException] = []
    # Waited for instead of the thread: a signal in Thread.join marks a thread that runs on as ended.
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  (raised again below, in the main thread)
            failure.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="lossworks-fit", daemon=True)
    with stop_signals_interrupt():
        thread.start()
        try:
            _wait(done, look)
        except KeyboardInterrupt:
            stop_file.touch()
            say("stopping after this step, with a checkpoint; once more to stop at once")
            _wait(done, look)
    look()
    if failure:
        raise failure[0]


def _wait(done: threading.Event, look: Callable[[], None]) -> None:
    while not done.wait(0.2):
        look()
