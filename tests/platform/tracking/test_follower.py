import math
import threading
import time

import pytest

from lossworks.errors import RunError
from lossworks.specs import TrackingSpec
from lossworks.tracking import Follower, Journal, create_run, deliver, read_all
from lossworks.tracking.client import connect
from lossworks.tracking.delivery import Delivery


@pytest.fixture
def run(spec):
    return create_run(spec, name="train", parameters={}, tags={})


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path / "run" / "metrics.jsonl") as journal:
        yield journal


def write(journal, steps):
    for step in steps:
        journal.write(step, {"train/loss": 10 / step, "train/lr": 0.1})


def expected(steps):
    return [(step, 10 / step) for step in steps]


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_rows_are_shown_at_once_and_all_arrive(spec, run, journal, history):
    write(journal, [1, 2])
    shown = []
    with Follower(spec, run, journal.path, on_row=shown.append):
        write(journal, range(3, 1300))
        wait_until(lambda: len(shown) == 1297, 5)
        write(journal, [1300])

    assert [row["step"] for row in shown] == list(range(3, 1301))
    assert history(spec, run, "train/loss") == expected(range(1, 1301))
    assert len(history(spec, run, "train/lr")) == 1300


def test_a_display_that_fails_does_not_stop_delivery(spec, run, journal, history, caplog):
    def fail(row):
        raise ValueError("no such column")

    with Follower(spec, run, journal.path, on_row=fail):
        write(journal, range(1, 5))

    assert history(spec, run, "train/loss") == expected(range(1, 5))
    assert "could not be shown" in caplog.text


def test_sending_the_same_rows_again_doubles_nothing(spec, run, journal, history):
    write(journal, range(1, 50))
    journal.write(50, {"train/loss": math.nan})
    assert deliver(spec, run, journal.path) == 50
    mark = journal.path.with_name("metrics.jsonl.delivered")
    assert int(mark.read_text()) == journal.path.stat().st_size
    write(journal, range(51, 60))
    mark.unlink()

    assert deliver(spec, run, journal.path) == 59
    assert deliver(spec, run, journal.path) == 0
    points = history(spec, run, "train/loss")
    assert [step for step, _ in points] == list(range(1, 60))


def test_values_that_are_not_finite_arrive_as_nan_with_a_mark(spec, run, journal, history):
    for step, value in enumerate([1.0, math.inf, -math.inf, math.nan]):
        journal.write(step, {"train/loss": value})
    deliver(spec, run, journal.path)

    values = [value for _, value in history(spec, run, "train/loss")]

    assert values[0] == 1.0
    assert all(math.isnan(value) for value in values[1:])
    assert history(spec, run, "nonfinite/train/loss") == [(1, 1.0), (2, -1.0), (3, 0.0)]
    assert read_all(journal.path)[1]["metrics"]["train/loss"] == math.inf


class Crash(BaseException):
    """The death of the process, as far as the delivery can tell."""


def test_a_follower_that_dies_before_or_after_a_request_loses_and_doubles_nothing(
    spec, run, journal, history
):
    write(journal, range(1, 450))
    client = connect(spec)

    class Dying:
        calls = 0

        def log_batch(self, *arguments, **values):
            self.calls += 1
            if self.calls == 2:
                raise Crash
            client.log_batch(*arguments, **values)
            if self.calls == 4:
                raise Crash

    dying = Dying()
    for _ in range(2):
        with pytest.raises(Crash):
            Delivery(dying, run, journal.path).send()
    with Follower(spec, run, journal.path):
        write(journal, range(450, 500))

    assert history(spec, run, "train/loss") == expected(range(1, 500))


def test_an_outage_of_a_real_server_delays_rows_and_loses_none(server_spec, server, journal, history):
    run = create_run(server_spec, name="train", parameters={}, tags={})
    messages = []
    follower = Follower(server_spec, run, journal.path, on_message=messages.append)
    try:
        with follower:
            write(journal, range(1, 101))
            wait_until(lambda: len(history(server_spec, run, "train/loss")) == 100)
            server.kill()
            write(journal, range(101, 201))
            wait_until(lambda: messages)
            restart = threading.Timer(1.0, server.start)
            restart.start()
            write(journal, range(201, 301))
        restart.join()
    finally:
        if server.process is None:
            server.start()

    assert follower.undelivered == 0
    assert history(server_spec, run, "train/loss") == expected(range(1, 301))
    assert len(messages) == 2
    assert "is away" in messages[0]
    assert "is back" in messages[1]


def test_an_outage_that_outlives_the_run_is_made_up_for(server_spec, server, journal, history):
    run = create_run(server_spec, name="train", parameters={}, tags={})
    follower = Follower(server_spec, run, journal.path, on_message=lambda text: None)
    with follower:
        server.kill()
        try:
            write(journal, range(1, 31))
            began = time.monotonic()
            assert follower.close(patience_s=1.0) == 30
            assert time.monotonic() - began < 20
            assert follower.close(patience_s=100.0) == 30
            with pytest.raises(RunError, match="tracking store http"):
                deliver(server_spec, run, journal.path)
        finally:
            server.start()

    assert deliver(server_spec, run, journal.path) == 30
    assert history(server_spec, run, "train/loss") == expected(range(1, 31))


def test_an_answer_that_was_lost_doubles_nothing_on_a_real_server(server_spec, journal, history):
    run = create_run(server_spec, name="train", parameters={}, tags={})
    write(journal, range(1, 250))
    client = connect(server_spec)

    class Deaf:
        def log_batch(self, *arguments, **values):
            client.log_batch(*arguments, **values)
            raise ConnectionError("the answer was lost")

    with pytest.raises(ConnectionError):
        Delivery(Deaf(), run, journal.path).send()

    assert deliver(server_spec, run, journal.path) == 249
    assert history(server_spec, run, "train/loss") == expected(range(1, 250))


def test_an_exception_in_the_block_does_not_wait_for_the_server(home, journal):
    spec = TrackingSpec(uri="http://127.0.0.1:9", patience_s=300)
    write(journal, [1])
    follower = Follower(spec, "0" * 32, journal.path, on_message=lambda text: None)
    began = time.monotonic()

    with pytest.raises(KeyError), follower:
        raise KeyError

    assert time.monotonic() - began < 20
    assert follower.undelivered == 1


def test_system_metrics_are_sampled_without_a_server_and_delivered_with_one(
    spec, run, journal, history, monkeypatch
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    away = TrackingSpec(uri="http://127.0.0.1:9")
    with Follower(away, run, journal.path, system_metrics=True, on_message=lambda text: None) as follower:
        system = journal.path.with_name("system.jsonl")
        wait_until(lambda: len(read_all(system)) >= 2)
        follower.close(0)
    sampled = read_all(system)
    with Follower(spec, run, journal.path, system_metrics=True):
        wait_until(lambda: len(read_all(system)) > len(sampled))

    points = history(spec, run, "system/cpu_utilization_percentage")

    assert [step for step, _ in points] == list(range(len(read_all(system))))
    assert len(points) > len(sampled)
