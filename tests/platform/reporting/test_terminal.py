import io
import threading

import pytest
from rich.console import Console

from lossworks.reporting import TrainProgress, print_summary, progress


def row(step, **metrics):
    return {"step": step, "time_ms": 0, "metrics": {"train/loss": 10 / step, **metrics}}


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def console(terminal=False):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def test_without_a_terminal_there_is_a_line_every_tenth_of_the_steps(clock):
    out = console()
    with TrainProgress(100, console=out) as shown:
        for step in range(1, 101):
            clock.now += 0.5
            shown.update(row(step, **{"train/tokens_per_second": 21500.4}))

    lines = out.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", *(f"{step}/100" for step in range(10, 101, 10))]
    assert lines[1] == "step 10/100  loss 1.0000  21,500 tokens/s  elapsed 0:00:05  left 0:00:45"
    assert lines[-1] == "step 100/100  loss 0.1000  21,500 tokens/s  elapsed 0:00:50"


def test_without_a_terminal_slow_runs_print_every_ten_seconds_and_fast_ones_rarely(clock):
    slow, fast = console(), console()
    with TrainProgress(1000, console=slow) as shown:
        for step in range(1, 21):
            clock.now += 4
            shown.update(row(step))
    with TrainProgress(100, console=fast) as shown:
        for step in range(1, 101):
            shown.update(row(step))

    assert [line.split()[1] for line in slow.file.getvalue().splitlines()][:3] == [
        "1/1000",
        "4/1000",
        "7/1000",
    ]
    assert [line.split()[1] for line in fast.file.getvalue().splitlines()] == ["1/100", "100/100"]


def test_the_time_left_counts_neither_earlier_steps_nor_the_start_of_the_workers(clock):
    out = console()
    with TrainProgress(100, first_step=50, console=out) as shown:
        clock.now += 30
        shown.update(row(51))
        clock.now += 9
        shown.update(row(60))

    assert out.file.getvalue().splitlines() == [
        "step 51/100  loss 0.1961  elapsed 0:00:30",
        "step 60/100  loss 0.1667  elapsed 0:00:39  left 0:00:40",
    ]


def test_on_a_terminal_a_bar_is_drawn_and_messages_stand_above_it():
    out = console(terminal=True)
    with TrainProgress(10, console=out) as shown:
        thread = threading.Thread(target=lambda: [shown.update(row(step)) for step in range(1, 11)])
        thread.start()
        thread.join()
        shown.message("checkpoint [best] saved")

    text = out.file.getvalue()
    assert "10/10" in text
    assert "loss 1.0000" in text
    assert "checkpoint [best] saved" in text


def test_rows_without_training_metrics_and_bad_values_are_shown_too():
    out = console()
    with TrainProgress(10, console=out) as shown:
        shown.update({"step": 3, "metrics": {"eval/loss": float("nan")}})

    assert "held-out nan" in out.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_summary_shows_everything_as_it_is(terminal):
    out = console(terminal)

    print_summary(
        "Run [a]", [("loss", "1.5 [nats]"), ("folder", "/x")], [("look", "lossworks ui")], console=out
    )

    text = out.file.getvalue()
    assert all(part in text for part in ("Run [a]", "1.5 [nats]", "lossworks ui", "folder"))


def test_a_summary_in_a_file_does_not_break_commands():
    out = console()
    command = "lossworks export " + "x" * 200

    print_summary("Run", [], [("export", command)], console=out)

    assert out.file.getvalue().splitlines() == ["Run", f"export: {command}"]
