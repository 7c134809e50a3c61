"""Ray's own node is not always up in time on a busy machine: it is tried again, and then said in one line."""

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from lossworks.adapters.ray_private import start_ray
from lossworks.errors import RunError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed."


def a_ray(errors):
    """Return what stands for Ray, whose starts leave a process behind and raise one after another."""
    calls = []

    def init(**options):
        calls.append(options)
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started.append(psutil.Process(left.pid))
        if errors:
            raise errors.pop(0)

    started = []
    return SimpleNamespace(init=init), calls, started


def gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_node_that_was_late_is_started_again():
    ray, calls, started = a_ray([Exception(LATE)])
    start_ray(ray, address="local")

    assert calls == [{"address": "local"}] * 2
    started[0].wait(5)
    assert gone(started[0])
    assert not gone(started[1])
    started[1].kill()


def test_a_node_that_is_late_again_is_said_in_one_line():
    ray, calls, _ = a_ray([Exception(LATE), Exception(LATE)])
    with pytest.raises(RunError, match="not up within 30 s, twice: this machine is too busy"):
        start_ray(ray)
    assert len(calls) == 2


def test_another_trouble_is_not_tried_again():
    ray, calls, started = a_ray([ConnectionError("nobody answers")])
    with pytest.raises(ConnectionError, match="nobody answers"):
        start_ray(ray)
    assert len(calls) == 1
    started[0].kill()
