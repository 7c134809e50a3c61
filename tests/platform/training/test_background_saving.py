"""Checkpoints written while training goes on: the same files, whatever happens meanwhile."""

import subprocess
import sys
from pathlib import Path

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.training.checkpoints import checkpoint
from lossworks.training.checkpoints.checkpoint import CheckpointStore, tensors_in
from lossworks.training.planning.rehearsal import COPY, MOMENTS, WEIGHTS, rehearse
from lossworks_testing.background_saving import slow_down, train_while_storage_refuses
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, prepared, run_several, run_training, tiny_spec

EVERY = {"every": 2, "keep": 99}


def spec_of(text, *, background=True, **changes):
    saving = {**EVERY, "background": background, **changes.pop("checkpoint", {})}
    return tiny_spec(text, checkpoint=saving, **changes)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def tensors(folder):
    """Return all tensors of all checkpoints in a folder, by checkpoint and name."""
    return {
        f"{path.name} {name}": value
        for path in sorted(Path(folder).glob("step-*"))
        for part in ("model.", "optimizer.")
        for name, value in tensors_in(path, part).items()
    }


def assert_equal(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert value.equal(other[name]), name


def test_a_checkpoint_is_that_of_its_step_though_training_goes_on(text, tmp_path, monkeypatch):
    """Storage is so slow that several steps pass; the next checkpoint waits for it, and so does the end."""
    monkeypatch.setattr(checkpoint, "_write_shards", checkpoint._write_shards)  # restored after slow_down
    plain, own = (spec_of(text, background=background) for background in (False, True))
    corpus = str(prepared(plain).folder)
    expected = run_training(plain.model_dump(mode="json"), corpus, str(tmp_path / "plain"))
    slow_down(0.3)
    found = run_training(own.model_dump(mode="json"), corpus, str(tmp_path / "own"))

    assert losses(found) == losses(expected)
    assert_equal(tensors(tmp_path / "own"), tensors(tmp_path / "plain"))
    assert Path(found["checkpoint"]).name == Path(expected["checkpoint"]).name
    assert Path(found["best"]).name == Path(expected["best"]).name
    assert not list((tmp_path / "own").glob(".*"))


@pytest.mark.parametrize("sharding", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_write_the_same_checkpoints(sharding, text, tmp_path):
    more = {"workers": 2, "sharding": sharding}
    plain, own = (spec_of(text, background=background, **more) for background in (False, True))
    runs = [
        (plain.model_dump(mode="json"), str(tmp_path / "plain")),
        (own.model_dump(mode="json"), str(tmp_path / "own")),
    ]
    found = run_ranks(2, run_several, runs, str(prepared(plain).folder), folder=tmp_path)[0]

    assert losses(found[1]) == losses(found[0])
    assert_equal(tensors(tmp_path / "own"), tensors(tmp_path / "plain"))


@pytest.mark.slow
def test_two_ranks_go_on_from_such_a_checkpoint_as_if_nothing_had_been(text, tmp_path):
    """Stopped after step 3, whose checkpoint is written before the ranks end."""
    spec = spec_of(text, workers=2, sharding="fsdp")
    values, corpus = spec.model_dump(mode="json"), str(prepared(spec).folder)
    whole = run_ranks(2, run_training, values, corpus, str(tmp_path / "whole"), folder=tmp_path)[0]
    first, second = (
        run_ranks(2, run_training, values, corpus, str(tmp_path / "parts"), stop, folder=tmp_path)[0]
        for stop in (3, None)
    )

    assert losses(first) + losses(second) == losses(whole)
    last = f"step-{spec.steps:08d}"
    for part in ("model.", "optimizer."):
        assert_equal(*(tensors_in(tmp_path / name / last, part) for name in ("parts", "whole")))


def test_storage_that_refuses_meanwhile_ends_all_ranks_alike(text, tmp_path):
    """Not lost, though the thread meets with it: at the next step, and the checkpoint before is whole."""
    spec = spec_of(text, workers=2, sharding="ddp", checkpoint={"patience_s": 0})
    given = (spec.model_dump(mode="json"), str(prepared(spec).folder), str(tmp_path / "c"))
    found = run_ranks(2, train_while_storage_refuses, *given, folder=tmp_path)
    newest, complaints = CheckpointStore(tmp_path / "c", keep=2).newest()

    assert found[0]["error"] == found[1]["error"]
    assert "step 4: the checkpoint in" in found[0]["error"]
    assert "File too large" in found[0]["error"]
    assert found[0]["step"] == found[1]["step"] > 4
    assert (newest.step, complaints) == (2, [])


def test_a_process_that_is_killed_while_it_writes_leaves_the_checkpoints_before(text, tmp_path):
    """And the run that goes on from there ends with the numbers of one that was never interrupted."""
    spec = spec_of(text)
    file = tmp_path / "spec.yaml"
    file.write_text(spec.to_yaml())
    command = [
        sys.executable,
        "-m",
        "lossworks_testing.background_saving",
        str(file),
        str(tmp_path / "c"),
        "2",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
    ) as process:
        for line in process.stdout:
            if line.strip() == "5":  # that of step 4 is being written, for two seconds
                break
        process.kill()
    newest, complaints = CheckpointStore(tmp_path / "c", keep=99).newest()
    assert (newest.step, complaints) == (2, [])
    assert [path.name for path in (tmp_path / "c").glob(".*")] == [".step-00000004.partial"]

    corpus = str(prepared(spec).folder)
    resumed = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "c"))
    whole = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "whole"))
    assert losses(resumed) == losses(whole)[2:]
    assert_equal(tensors(tmp_path / "c"), tensors(tmp_path / "whole"))


def test_a_plan_counts_the_copy(text):
    found = rehearse(spec_of(text))

    assert found.peak[COPY] == found.peak[WEIGHTS] + found.peak[MOMENTS]
    assert COPY not in rehearse(spec_of(text, background=False)).peak
