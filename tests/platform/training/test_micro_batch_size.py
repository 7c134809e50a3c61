"""micro_batch_size=auto: the fastest size that fits, decided once, and without a trace in the run."""

import json
import time

import pytest
import torch

from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.distributed.world import World
from lossworks.training.loop import Trainer
from lossworks.training.measure import micro_batch_size as measuring
from lossworks.training.measure.micro_batch_size import TriedSize, fastest, sizes_of, try_sizes
from lossworks.training.planning.plan import make_plan, require_memory
from lossworks.training.planning.rehearsal import rehearse
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_several, run_training, tiny_spec

ALONE = World(0, 1, torch.device("cpu"))


def chosen(folder):
    return json.loads((folder / "micro-batch-size.json").read_text())["micro_batch_size"]


def assert_alike(one, other):
    """Losses and everything that checkpoints hold are equal to the bit."""
    assert losses(one) == losses(other)
    for part in ("model.", "optimizer.", "roles.", "methods."):
        a, b = (tensors_in(result["checkpoint"], part) for result in (one, other))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


RUNS = {
    "dropout and a random loss": tiny(
        model={"width": 16, "dropout": 0.3},
        loss="ensloss",
        data={"source": "wine", "classes": ["class_0", "class_1"]},
    ),
    "bags": tiny(
        batch_size=32, data={"source": "digits", "bag_size": 8}, loss="aggregate-interpolation", steps=3
    ),
    "muon": tiny(optimizer={"kind": "muon", "lr": 0.02}, methods=["smooth-adversarial-comp-sum"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_as_if_the_number_had_been_given(name, tmp_path):
    """Weights, optimiser, random streams, methods and the order of data know nothing of the trials."""
    auto = run_training({**RUNS[name], "micro_batch_size": "auto"}, None, str(tmp_path / "auto"))
    size = chosen(tmp_path / "auto")
    given = run_training({**RUNS[name], "micro_batch_size": size}, None, str(tmp_path / "given"))

    assert_alike(auto, given)
    assert auto["metrics"]["eval/loss"] == given["metrics"]["eval/loss"]
    assert auto["metrics"]["train/micro_batch_size"] == size
    (notice,) = auto["notices"]
    assert notice.startswith(f"micro_batch_size=auto: {size} rows at once are fastest; tried: ")
    assert name != "bags" or " 8 (" in notice
    assert name != "bags" or " 1 (" not in notice


def test_a_text_s_run_too_and_it_keeps_its_size_when_it_goes_on(text, corpus, tmp_path, monkeypatch):
    """The size is that of the run, whatever would be fastest by then; also before the first checkpoint."""
    values = tiny_spec(text, micro_batch_size="auto", steps=8).model_dump(mode="json")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "fastest", lambda tried: tried[1])
        stopped = run_training(values, corpus, str(tmp_path / "parts"), stop_after=2)
    assert chosen(tmp_path / "parts") == 2
    monkeypatch.setattr(Trainer, "try_sizes", None)  # nothing is tried any more
    rest = run_training(values, corpus, str(tmp_path / "parts"))
    whole = run_training({**values, "micro_batch_size": 2}, corpus, str(tmp_path / "whole"))

    assert losses(stopped) + losses(rest) == losses(whole)
    assert rest["metrics"]["train/micro_batch_size"] == 2
    for file in (tmp_path / "parts").glob("step-*/manifest.json"):
        file.unlink()
    again = run_training(values, corpus, str(tmp_path / "parts"))
    assert_alike(again, whole)


@pytest.mark.slow
def test_ranks_agree(text, corpus, tmp_path):
    """Under ddp and fsdp, with unequal shares; a rank alone would choose by its own clock."""
    spec = tiny_spec(text, batch_size=7, workers=2, micro_batch_size="auto", sharding="ddp")
    split = spec.override(["sharding=fsdp", "activation_checkpointing=true"])
    autos = [(one.model_dump(mode="json"), str(tmp_path / one.sharding.kind)) for one in (spec, split)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found, others = run_ranks(2, run_several, autos, corpus, folder=tmp_path / "a")
    sizes = [chosen(tmp_path / kind) for kind in ("ddp", "fsdp")]
    given = [
        ({**values, "micro_batch_size": size}, f"{folder}-given")
        for (values, folder), size in zip(autos, sizes, strict=True)
    ]
    expected = run_ranks(2, run_several, given, corpus, folder=tmp_path / "b")[0]

    for one, other, plain in zip(found, others, expected, strict=True):
        assert_alike(one, plain)
        assert one["metrics"]["train/loss"] == other["metrics"]["train/loss"]


@pytest.mark.slow
def test_compiled_blocks_keep_nothing_of_the_trials(text, corpus, tmp_path):
    """What was compiled for several sizes would compute otherwise."""
    values = tiny_spec(text, micro_batch_size="auto", compile=True, steps=3).model_dump(mode="json")
    auto = run_training(values, corpus, str(tmp_path / "auto"))
    torch.compiler.reset()
    size = chosen(tmp_path / "auto")
    given = run_training({**values, "micro_batch_size": size}, corpus, str(tmp_path / "given"))

    assert_alike(auto, given)


def test_which_sizes_are_tried():
    """Powers of two and the whole share, as far as the run can take them."""
    assert sizes_of(parse_train_spec(tiny()), 30) == [1, 2, 4, 8, 16, 30]
    assert sizes_of(parse_train_spec(tiny()), 32) == [1, 2, 4, 8, 16, 32]
    assert sizes_of(parse_train_spec(tiny()), 1) == [1]
    assert sizes_of(parse_train_spec(RUNS["bags"]), 32) == [8, 16, 32]


def test_the_fastest_step_wins():
    """A try takes four micro-batches at most; the seconds are those of a whole step."""
    calls = []

    def attempt(rows, count):
        calls.append((rows, count))
        time.sleep(0.004 * count)

    tried = try_sizes(parse_train_spec(tiny()), attempt, 30, ALONE)
    assert sorted(set(calls)) == [(1, 4), (2, 4), (4, 4), (8, 4), (16, 2), (30, 1)]
    assert [one.rows for one in tried] == [1, 2, 4, 8, 16, 30]
    assert tried[0].seconds >= 0.004 * 30
    assert fastest(tried).rows == 30
    assert fastest([TriedSize(1, 3.0, 0), TriedSize(2, 1.0, 0), TriedSize(4, 2.0, 0)]).rows == 2


def test_a_size_that_does_not_fit_ends_the_trials():
    """When a GPU says so; the smallest must fit, or the run can't go on."""

    def attempt(rows, _):
        if rows >= most:
            raise torch.OutOfMemoryError("full")

    most = 8
    assert [one.rows for one in try_sizes(parse_train_spec(tiny()), attempt, 30, ALONE)] == [1, 2, 4]
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        try_sizes(parse_train_spec(tiny()), attempt, 30, ALONE)


def test_a_size_is_not_tried_that_would_take_more_than_is_free(monkeypatch):
    """Each row takes 160 MiB and there are 800 MiB: 8 rows would take 1,280, and nobody tries that.

    So much, since what else the process of the tests holds comes and goes by tens of MiB.
    """

    def attempt(rows, _):
        assert rows <= 4
        torch.ones(rows, 160, 2**18)

    monkeypatch.setattr(measuring, "_free_bytes", lambda _: 800 * 2.0**20)
    tried = try_sizes(parse_train_spec(tiny()), attempt, 30, ALONE)
    assert [one.rows for one in tried] == [1, 2, 4]
    assert tried[-1].bytes == pytest.approx(640 * 2**20, rel=0.2)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "fast", True, [4]])
def test_other_sizes_are_refused(wrong):
    with pytest.raises(
        UserError, match=r"micro_batch_size=.*: must be an integer of at least 1, auto, or null"
    ):
        parse_train_spec(tiny(micro_batch_size=wrong))


def test_a_plan_takes_the_largest_that_fits(text):
    """And says so."""
    spec = tiny_spec(text, batch_size=4, micro_batch_size="auto", data={"sequence_length": 64})
    two = rehearse(spec.override(["micro_batch_size=2"])).peak_bytes
    plan = make_plan(spec, memory=two)

    assert plan.fits is True
    assert plan.rehearsal.peak_bytes == two
    assert plan.notes[0] == "micro_batch_size=auto measures when the run starts; planned with 2 at most"
    require_memory(spec)
