"""Companions of a model in training, and trained weights to begin from."""

import re
from pathlib import Path

import pytest
import torch

from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import CheckpointStore, tensors_in
from lossworks.training.loop import Job, Trainer
from lossworks.training.weights.export import export_run
from lossworks.training.weights.start import check_companions
from lossworks_testing.classification import tiny
from lossworks_testing.offered import Distillation, offer, run_offered
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_training

# The second term reads what the companion gives.
TAUGHT = tiny(batch_size=21, loss=["cross-entropy", {"name": "to-teacher", "weight": 0.5}])
FOLLOWED = {**TAUGHT, "roles": {"teacher": {"ema": 0.8}}}
REFERRED = {**TAUGHT, "roles": {"teacher": "start"}}


@pytest.fixture(autouse=True)
def _offered(monkeypatch):
    offer(monkeypatch, Distillation)


def trainer(values, folder) -> Trainer:
    """Return a run before its first step."""
    found = Trainer(Job(parse_train_spec(values), None, CheckpointStore(folder, keep=2), lambda *_: None))
    found.clock.start()
    found.model.train()
    return found


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_a_moving_copy_keeps_its_share_at_every_step(tmp_path):
    """c ← 0.8 c + 0.2 θ, from the start's parameters on; what it gives has no gradient."""
    run = trainer(FOLLOWED, tmp_path)
    expected = parameters(run.headed_model)
    for _ in range(4):
        run._advance()
        for name, value in parameters(run.headed_model).items():
            expected[name] = 0.8 * expected[name] + 0.2 * value
    copied = run.roles.moving()["teacher"]
    given = run.roles.outputs(run.task.train.batch(run.order.rows(0, 0, 1)))["teacher"]

    torch.testing.assert_close(parameters(copied), expected)
    assert not any(value.requires_grad for value in (given.hidden, given.logits))
    assert not copied.training


def test_a_reference_stays_at_the_start(tmp_path):
    """It is the model as training begins, trained before or not, and after an interruption as well."""
    first = run_in_folder(tiny(steps=3), "first")
    values = {**REFERRED, "start": "first"}
    begun = trainer(values, tmp_path / "c")
    start = parameters(begun.headed_model)
    for _ in range(3):
        begun._advance()
    again = trainer(values, tmp_path / "c")
    again._restore()

    stored = tensors_in(Path(str(first.checkpoints / "step-00000003")), "model.")
    assert again.step == 3
    for run in (begun, again):
        reference = parameters(run.roles._models["teacher"])
        assert all(torch.equal(reference[name], stored[name]) for name in reference)
        assert any(
            not torch.equal(value, start[name]) for name, value in parameters(run.headed_model).items()
        )


@pytest.mark.parametrize("values", [FOLLOWED, REFERRED], ids=["moving", "reference"])
def test_going_on_equals_no_interruption(values, tmp_path):
    """To the last digit, held-out losses included."""
    (whole,) = run_offered([(values, str(tmp_path / "whole"))])
    run_offered([(values, str(tmp_path / "parts"))], stop_after=4)
    (rest,) = run_offered([(values, str(tmp_path / "parts"))])

    assert losses(rest) == losses(whole)[4:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]


def test_ranks_give_what_one_process_gives(tmp_path):
    """As replicas and with split parameters, companions included."""
    (one,) = run_offered([(FOLLOWED, str(tmp_path / "one"))])
    split = {**FOLLOWED, "workers": 2, "micro_batch_size": 4}
    runs = [({**split, "sharding": kind}, str(tmp_path / kind)) for kind in ("ddp", "fsdp")]
    (tmp_path / "ranks").mkdir()

    for two in run_ranks(2, run_offered, runs, folder=tmp_path / "ranks")[0]:
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        assert two["metrics"]["eval/loss"] == pytest.approx(one["metrics"]["eval/loss"], rel=1e-4)
        copied, expected = (tensors_in(Path(run["checkpoint"]), "roles.teacher.") for run in (two, one))
        assert copied
        torch.testing.assert_close(copied, expected, rtol=1e-3, atol=1e-5)


def test_a_teacher_of_another_width_teaches(tmp_path):
    """A run, or the folder of its export; what it says of a batch is what the student is pulled to."""
    once = {"steps": 40, "checkpoint": {"every": 40}, "evaluation": {"every": 40, "sequences": 1000}}
    teacher = run_in_folder(tiny(**once, model={"width": 24}), "teacher")
    export_run(teacher, tmp_path / "exported")
    alone = tiny(**once, loss="to-teacher", model={"width": 8})
    found = [
        run_training({**alone, "roles": {"teacher": source}}, None, str(tmp_path / name))
        for name, source in (("run", "teacher"), ("folder", str(tmp_path / "exported")))
    ]
    labels = run_training(tiny(**once, model={"width": 8}), None, str(tmp_path / "labels"))

    assert losses(found[0]) == losses(found[1])
    assert found[0]["metrics"]["eval/accuracy"] > 0.9  # without having seen a label
    assert losses(found[0]) != losses(labels)


def test_telemetry_sees_what_a_companion_says(tmp_path):
    """Of one example it is the step's loss."""
    values = {**REFERRED, "batch_size": 1, "telemetry": {"every": 1}}
    (result,) = run_offered([(values, str(tmp_path))])

    for _, row in result["rows"]:
        assert row["telemetry/loss_max"] == pytest.approx(row["train/loss"], rel=1e-5)


def test_what_does_not_fit_is_refused_in_words(tmp_path):
    """Before anything starts: outputs, tasks, architectures, and what isn't there."""
    run_in_folder(tiny(steps=1, data={"source": "digits"}), "digits")
    run_in_folder(tiny(steps=1), "wine")
    values = {
        "task": "regression",
        "steps": 1,
        "workers": 1,
        "sharding": "none",
        "tracking": {"model": False},
    }
    run_in_folder(values | {"data": {"source": "friedman:40"}}, "numbers")

    def refusal(**changes):
        spec = parse_train_spec({**tiny(), **changes})
        with pytest.raises(UserError) as refused:
            check_companions(spec, task_of(spec).open(spec, None))
        return str(refused.value)

    assert "roles.teacher.of=digits" in refusal(loss="to-teacher", roles={"teacher": "digits"})
    assert "was trained as task=regression, not classification" in refusal(
        loss="to-teacher", roles={"teacher": "numbers"}
    )
    assert "roles.teacher.of=nowhere: is no folder" in refusal(
        loss="to-teacher", roles={"teacher": "nowhere"}
    )
    wide = refusal(start="wine", model={"width": 20})
    assert "start=wine: layers.0.1.weight is (16, 13) there and (20, 13) here" in wide
    assert "start=wine: lacks layers.2.1.weight" in refusal(start="wine", model={"width": 16, "layers": 3})
    assert "start=wine: holds layers.1.1.weight" in refusal(start="wine", model={"width": 16, "layers": 1})
    with pytest.raises(UserError, match=r"give one of `of` \(a run, a folder or start\) and `ema`"):
        parse_train_spec(tiny(roles={"teacher": {"of": "wine", "ema": 0.5}}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "to-teacher"}, "roles: to-teacher reads a companion named teacher; set roles.teacher"),
        (
            {"loss": "to-teacher", "roles": {"teacher": "start", "techer": "start"}},
            "roles.techer: nothing here reads a companion of that name; what is read: teacher",
        ),
        ({"roles": {"teacher": "start"}}, "no loss or method reads any"),
    ],
    ids=["missing", "mistyped", "unused"],
)
def test_companions_and_their_readers_fit(changes, words):
    """A companion that nothing reads would only cost time."""
    with pytest.raises(UserError, match=re.escape(words)):
        parse_train_spec(tiny(**changes))


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_a_run_begins_from_trained_weights(kind, tmp_path):
    """Its first held-out loss, after a step that moves nothing, is the other run's best."""
    folder = run_in_folder(tiny(steps=30, optimizer={"lr": 0.3}, checkpoint={"every": 3, "keep": 1}), "first")
    best = CheckpointStore(folder.checkpoints, keep=1).best()
    export_run(folder, tmp_path / "exported")
    start = "first" if kind == "run" else str(tmp_path / "exported")
    values = tiny(steps=1, start=start, optimizer={"lr": 1e-12, "weight_decay": 0.0})
    again = run_training(values, None, str(tmp_path / "again"))

    assert best.step < 30
    assert again["metrics"]["eval/loss"] == pytest.approx(best.held_out_loss, rel=1e-6)
