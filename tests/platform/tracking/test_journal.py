import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossworks.errors import RunError, UserError
from lossworks.tracking import Journal, last_step, read_all, read_rows

NAMES = st.from_regex(r"[a-z_]{1,8}(/[a-z0-9_. -]{0,6}[a-z0-9])?", fullmatch=True)
METRICS = st.dictionaries(NAMES, st.floats(width=64), min_size=1, max_size=4)


def same(left, right):
    return left == right or (math.isnan(left) and math.isnan(right))


@given(written=st.lists(METRICS, max_size=20))
def test_rows_are_read_as_they_were_written(tmp_path_factory, written):
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    with Journal.open(path) as journal:
        for step, metrics in enumerate(written):
            assert journal.write(step, metrics)

    rows = read_all(path)

    assert [row["step"] for row in rows] == list(range(len(written)))
    for row, metrics in zip(rows, written, strict=True):
        assert row["metrics"].keys() == metrics.keys()
        assert all(same(row["metrics"][name], value) for name, value in metrics.items())


@given(cut=st.integers(0, 400), limit=st.integers(1, 3))
def test_a_file_cut_anywhere_gives_its_complete_rows_in_pieces(tmp_path_factory, cut, limit):
    path = tmp_path_factory.mktemp("journal") / "metrics.jsonl"
    with Journal.open(path) as journal:
        for step in range(5):
            journal.write(step, {"train/loss": step / 3})
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])

    steps, offset = [], 0
    while True:
        rows, behind = read_rows(path, offset, limit=limit)
        if behind == offset:
            break
        steps += [row["step"] for row in rows]
        offset = behind

    assert steps == list(range(whole[:cut].count(b"\n")))


def test_lines_are_json_without_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal.open(path) as journal:
        journal.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1})

    line = json.loads(path.read_text(), parse_constant=pytest.fail)

    assert line["metrics"] == {"a": "nan", "b": "inf", "c": "-inf", "d": 0.1}
    assert line["time_ms"] > 1_600_000_000_000


def test_a_torn_last_line_is_dropped_when_the_journal_is_opened_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal.open(path) as journal:
        journal.write(1, {"train/loss": 2.0})
    with path.open("ab") as file:
        file.write(b'{"step":2,"time_ms":1,"metr')
    rows, offset = read_rows(path)

    with Journal.open(path) as journal:
        journal.write(2, {"train/loss": 1.5})

    assert [row["step"] for row in rows] == [1]
    assert [row["step"] for row in read_rows(path, offset)[0]] == [2]
    assert [row["step"] for row in read_all(path)] == [1, 2]


def test_repeated_steps_give_each_metric_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Journal.open(path) as journal:
        for step in range(1, 8):
            journal.write(step, {"train/loss": 1.0})
    with Journal.open(path) as journal:
        assert not journal.write(5, {"train/loss": 9.0})
        assert journal.write(7, {"train/loss": 9.0, "eval/loss": 3.0})
        assert journal.write(8, {"train/loss": 1.0})

    losses = [(row["step"], row["metrics"].get("train/loss")) for row in read_all(path)]

    assert losses == [*((step, 1.0) for step in range(1, 8)), (7, None), (8, 1.0)]


def test_last_step_is_that_of_the_last_training_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    with Journal.open(path) as journal:
        journal.write(3, {"train/loss": 1.0})
        journal.write(4, {"eval/loss": 1.0})

    assert last_step(path) == 3
    assert last_step(path, "eval/") == 4


def test_a_damaged_line_is_skipped_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with Journal.open(path) as journal:
        journal.write(1, {"a": 1.0})
        with path.open("ab") as file:
            file.write(b"\0\0\0\n[1]\n")
        journal.write(2, {"a": 1.0})

    assert [row["step"] for row in read_all(path)] == [1, 2]
    assert caplog.text.count("no row") == 2


@pytest.mark.parametrize(
    "name", ["", "a#b", "loss\n", "../a", "/a", "a//b", "a/", ".", "..", "a/../b", "ä", "x" * 251]
)
def test_names_that_mlflow_refuses_are_user_errors(tmp_path, name):
    with Journal.open(tmp_path / "metrics.jsonl") as journal, pytest.raises(UserError, match="metric name"):
        journal.write(1, {name: 1.0})

    assert read_all(tmp_path / "metrics.jsonl") == []


def test_a_negative_step_is_a_user_error(tmp_path):
    with Journal.open(tmp_path / "metrics.jsonl") as journal, pytest.raises(UserError, match="step=-1"):
        journal.write(-1, {"a": 1.0})


def test_a_folder_that_can_not_be_made_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(RunError, match="can't be opened"):
        Journal.open(tmp_path / "file" / "metrics.jsonl")


def test_a_line_that_the_disk_took_half_of_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write = os.write
    with Journal.open(path) as journal:
        journal.write(1, {"a": 1.0})
        monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:10]))
        with pytest.raises(RunError, match="disk is full"):
            journal.write(2, {"a": 1.0})
        monkeypatch.undo()
        journal.write(2, {"a": 2.0})

    assert [row["step"] for row in read_all(path)] == [1, 2]
