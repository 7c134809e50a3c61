"""What a command does when its terminal is closed."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from lossworks_testing.terminal import Terminal

WAITS = """
import signal, sys, time
from lossworks.signals import hangups_ignored, stop_signals_interrupt
with hangups_ignored():
    pass
try:
    with stop_signals_interrupt():
        print("waiting", flush=True)
        time.sleep(float(sys.argv[2]))
except KeyboardInterrupt:
    print("saving", flush=True)
    print("said on standard error", file=sys.stderr, flush=True)
open(sys.argv[1], "w").write("saved")
"""


def test_a_closed_terminal_leaves_time_to_save(tmp_path):
    """What is printed after that is no error, which would end whatever saves the run."""
    terminal = Terminal([sys.executable, "-c", WAITS, str(tmp_path / "file"), "60"], os.environ)
    terminal.read_until("waiting")

    assert terminal.close(seconds=20) == 0
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_to_stop_is_an_interrupt(tmp_path, number):
    """Without a terminal, too, and what is printed arrives."""
    command = [sys.executable, "-c", WAITS, str(tmp_path / "file"), "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first = process.stdout.readline()
    process.send_signal(number)

    assert (first, process.communicate(timeout=20)[0]) == ("waiting\n", "saving\nsaid on standard error\n")
    assert (tmp_path / "file").read_text() == "saved"


def test_nohup_means_to_go_on(tmp_path):
    """An ignored signal stays ignored."""
    command = ["nohup", sys.executable, "-c", WAITS, str(tmp_path / "file"), "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)

    assert process.communicate(timeout=20)[0] == ""
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_child_ends_with_a_parent_that_is_killed():
    """Also if it has a session of its own, and the parent no chance to say anything."""
    code = (
        "import subprocess, time; from lossworks.signals import end_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], start_new_session=True, preexec_fn=end_with_parent)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()

    child.wait(timeout=10)
    assert not child.is_running()
