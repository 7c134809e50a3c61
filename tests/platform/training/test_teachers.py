"""Runs that learn from a trained teacher: classifiers and language models, alone or in a sum."""

import math
import re

import pytest

from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.planning.rehearsal import rehearse
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks.training.weights.start import check_companions, settled
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_several, run_training, tiny_spec

TERMS = ["cross-entropy", {"name": "distillation", "weight": 0.5, "divergence": "jensen-shannon"}]
TAUGHT = tiny(batch_size=21, loss=TERMS, roles={"teacher": {"ema": 0.8}})
DISTILLED = {"loss": {"name": "distillation"}, "roles": {"teacher": {"of": "teacher"}}}


def test_going_on_and_ranks_change_nothing(tmp_path):
    """To the last digit after an interruption, to rounding as replicas and with split parameters."""
    whole = run_training(TAUGHT, None, str(tmp_path / "whole"))
    run_training(TAUGHT, None, str(tmp_path / "parts"), stop_after=4)
    rest = run_training(TAUGHT, None, str(tmp_path / "parts"))
    split = {**TAUGHT, "workers": 2, "micro_batch_size": 4}
    runs = [({**split, "sharding": kind}, str(tmp_path / kind)) for kind in ("ddp", "fsdp")]
    (tmp_path / "ranks").mkdir()

    assert losses(rest) == losses(whole)[4:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    for two in run_ranks(2, run_several, runs, None, folder=tmp_path / "ranks")[0]:
        assert losses(two) == pytest.approx(losses(whole), rel=1e-4)
        assert two["metrics"]["eval/loss"] == pytest.approx(whole["metrics"]["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("loss", ["distillation", TERMS], ids=["alone", "sum"])
def test_a_small_classifier_learns_from_a_wide_one(loss, tmp_path):
    """Alone it has not seen a label; its export is evaluated without the teacher."""
    once = {"steps": 40, "checkpoint": {"every": 40}, "evaluation": {"every": 40, "sequences": 1000}}
    run_in_folder(tiny(**once, model={"width": 24}), "teacher")
    values = tiny(**once, loss=loss, roles={"teacher": "teacher"}, model={"width": 8})
    result = run_in_folder(values, "student")
    export_run(result, tmp_path / "exported")
    found = evaluate_folder(tmp_path / "exported")

    assert found.yardsticks["eval/accuracy"] > 0.9
    assert found.loss == pytest.approx(found.yardsticks["eval/cross_entropy"])


def test_a_language_model_takes_its_teacher_s_tokenizer(text, tmp_path):
    """Unless one is named; then it is the one that the run is stored with, and trains with."""
    teacher = run_in_folder(tiny_spec(text, steps=3).model_dump(mode="json"), "teacher")
    other = text.with_name("other.txt")
    other.write_text("".join(f"line {number} of another text\n" for number in range(400)))
    spec = tiny_spec(other, **DISTILLED, model={"width": 8}, data={"vocab_size": 400})
    found = settled(spec)

    assert found.data.tokenizer == str(teacher.learnt / "tokenizer.json")
    assert settled(found) == found
    own = spec.override(["data.tokenizer=/tokenizers/mine.json"])
    assert settled(own).data.tokenizer == "/tokenizers/mine.json"
    prepared = task_of(found).prepare(found)
    check_companions(found, task_of(found).open(found, prepared.folder))
    result = run_training(found.model_dump(mode="json"), str(prepared.folder), str(tmp_path / "student"))
    assert losses(result)[-1] < losses(result)[0]
    alone = found.override(["loss=cross-entropy", "roles={}"])
    assert rehearse(found).parameters == rehearse(alone).parameters
    # Between two workers, too, where a checkpoint can't be read any more.
    both = found.override(["workers=2", "sharding=ddp"])
    assert rehearse(both).parameters == rehearse(alone).parameters


def test_a_run_s_name_is_settled_as_its_id(text):
    """A newer run of that name must not become the teacher of some workers alone."""
    run_in_folder(tiny(steps=1, name="wide"), "0e1234")
    found = settled(parse_train_spec(tiny(loss="distillation", roles={"teacher": "wide"})))

    assert found.roles["teacher"].of == "0e1234"


def test_a_teacher_of_another_vocabulary_is_refused(text):
    """With the loss that takes one, where there is one."""
    run_in_folder(tiny_spec(text, steps=1).model_dump(mode="json"), "teacher")
    spec = tiny_spec(text, **DISTILLED, data={"vocab_size": 280})
    task = task_of(spec).open(spec, None)
    with pytest.raises(
        UserError,
        match=r"another tokenizer.json than the model; use one for both; what compares models of different "
        r"tokens: alm$",
    ):
        check_companions(spec, task)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "distillation"}, "roles: distillation reads a companion named teacher; set roles.teacher"),
        (
            {"loss": {"name": "distillation", "impl": "triton"}, "roles": {"teacher": "start"}},
            "impl=triton: distillation has no Triton kernel; use auto",
        ),
        (
            {"loss": {"name": "distillation", "divergence": "kl"}, "roles": {"teacher": "start"}},
            "distillation: divergence='kl' must be one of forward-kl, reverse-kl, jensen-shannon",
        ),
        (
            {"task": "regression", "data": {"source": "friedman:40"}, "loss": "distillation"},
            "distillation trains task=classification or language-model",
        ),
    ],
    ids=["no teacher", "triton", "divergence", "task"],
)
def test_what_cannot_work_is_refused_in_words(changes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_train_spec(tiny(**changes))


def test_the_entropy_of_a_model_s_answers(text, corpus, tmp_path):
    """Of a language model and of a classifier: at first about that of a uniform guess, and then less."""
    first = tiny_spec(text, steps=1, optimizer={"lr": 1e-9}, analyses=["token-entropy"])
    later = tiny_spec(text, steps=60, optimizer={"lr": 0.01}, analyses=["token-entropy"])
    found = [
        run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / str(spec.steps)))["metrics"]
        for spec in (first, later)
    ]
    classes = run_training(tiny(analyses=["token-entropy"], steps=1), None, str(tmp_path / "classes"))

    assert found[0]["eval/token_entropy"] == pytest.approx(math.log(300), rel=0.02)
    assert 0 < found[1]["eval/token_entropy"] < found[0]["eval/token_entropy"] - 1
    assert 0 < classes["metrics"]["eval/token_entropy"] <= math.log(3)
