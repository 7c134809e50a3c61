"""The profile of a few steps: it changes nothing, and what it shows is what ran."""

import gzip
import json

import pytest

from lossworks.errors import UserError
from lossworks.reporting.flames.flame import read_calls
from lossworks.training.measure.profiling import TRACE
from lossworks_testing.classification import tiny
from lossworks_testing.training import losses, run_training, tiny_spec

PROFILE = {"steps": 2, "start": 2}


def test_a_profile_changes_no_result_and_shows_the_steps(text, corpus, tmp_path):
    """The same losses bit for bit; a trace of steps 2 and 3 whose phases hold what they should."""
    spec = tiny_spec(text)
    plain = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "plain"))
    values = {**spec.model_dump(mode="json"), "profile": PROFILE}
    found = run_training(values, corpus, str(tmp_path / "found"), profile=str(tmp_path / "profile"))
    events = json.loads(gzip.decompress((tmp_path / "profile" / TRACE).read_bytes()))["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    calls = read_calls(tmp_path / "profile" / TRACE)
    step = calls.children["step"]

    assert losses(found) == losses(plain)
    assert found["metrics"]["eval/loss"] == plain["metrics"]["eval/loss"]
    assert found["notices"] == []
    assert [name for name in ranges if name.startswith("step ")] == ["step 2", "step 3"]
    assert step.count == calls.count == 2
    assert {"data", "forward", "head", "backward", "optimizer", "evaluation", "checkpoint"} <= set(ranges)
    assert step.total == pytest.approx(calls.total)
    in_steps = step.children["_advance (training/loop.py)"].children["_train_step (training/loop.py)"].total
    timed = [metrics["train/step_seconds"] for number, metrics in found["rows"] if number in (2, 3)]
    assert in_steps / 1e6 == pytest.approx(sum(timed), rel=0.1)


def test_a_run_that_stops_within_leaves_what_there_was(tmp_path):
    """And one without a folder leaves nothing."""
    values = tiny(profile={"steps": 5, "start": 2})
    run_training(values, None, str(tmp_path / "a"), stop_after=3, profile=str(tmp_path / "profile"))
    run_training(values, None, str(tmp_path / "b"))

    assert read_calls(tmp_path / "profile" / TRACE).count == 2
    assert {path.name for path in tmp_path.iterdir()} >= {"a", "b", "profile"}


def test_a_profile_that_cant_be_written_ends_no_run(tmp_path):
    """The run goes on and says so."""
    (tmp_path / "profile").write_text("a file where the folder should be")
    result = run_training(tiny(profile=1), None, str(tmp_path / "a"), profile=str(tmp_path / "profile"))

    assert result["status"] == "finished"
    assert len(result["notices"]) == 1
    assert "the profile can't be written" in result["notices"][0]


def test_a_profile_after_the_end_is_refused(text):
    """The error names both fields."""
    with pytest.raises(UserError, match=r"profile.start=5 must not be after the last of steps=4"):
        tiny_spec(text, steps=4, profile=3)
