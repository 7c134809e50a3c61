"""Sentences that are written at once: edits, yardsticks, and what losses of sequences are for."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from lossworks.catalogue.registry import create
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.tasks.text.sentences import BLANK, clean_sentences, edited, in_sentence
from lossworks.tracking import read_all
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_in_folder, run_several, run_training


def sentences(loss="cross-entropy", **changes):
    """Return the spec of twenty sentences of six words, which trains in about a second."""
    values = {
        "task": "sentences",
        "steps": 6,
        "batch_size": 40,
        "workers": 1,
        "sharding": {"kind": "none"},
        "data": {"sentences": 20, "length": 6, "words": 30, "copies": 50, "edits": 0.5},
        "model": {"width": 32},
        "loss": loss,
        "optimizer": {"lr": 0.05, "weight_decay": 0.0, "clip_norm": None},
        "evaluation": {"every": 3, "sequences": 1000},
        "checkpoint": {"every": 3},
    }
    return {**values, **changes}


def opened(values):
    spec = parse_train_spec(values)
    return task_of(spec).open(spec, None)


def possible(sentence, edits):
    """Yield all that a sentence can become, by plain lists."""
    for turn, twice, blank in itertools.product(range(len(sentence)), repeat=3):
        found = [*sentence[turn:], *sentence[:turn]] if "rotate" in edits else list(sentence)
        if "repeat" in edits:
            found = [*found[: twice + 1], *found[twice:-1]]
        if "blank" in edits:
            found[blank] = BLANK
        yield tuple(found)


def test_copies_are_rotated_have_a_word_repeated_and_one_blanked():
    """Each is one of what the three edits can make of the sentence, and without edits it is the sentence."""
    spec = parse_train_spec(sentences()).data
    clean = clean_sentences(spec, 0)[torch.arange(60) % 20]
    allowed = [set(possible(row, ("rotate", "repeat", "blank"))) for row in clean.tolist()]

    found = edited(clean, 1.0, 0)
    assert all(tuple(row) in own for row, own in zip(found.tolist(), allowed, strict=True))
    assert ((found == BLANK).sum(1) == 1).all()
    assert torch.equal(edited(clean, 0.0, 0), clean)
    assert torch.equal(edited(clean, 1.0, 0), found)
    assert not torch.equal(edited(clean, 1.0, 1), found)
    assert (clean != BLANK).all()


def test_edits_come_with_their_chance():
    """Of three edits of the chance c, (1 − c)³ of the copies have none, but for edits that change nothing."""
    data = {"sentences": 50, "length": 9, "words": 1000, "copies": 100, "edits": 0.3}
    task = opened(sentences(data=data))
    numbers, copies = task.train.inputs, task.train.labels
    same = (copies == task.held_out.labels[numbers]).all(1).double().mean()

    assert (copies == BLANK).any(1).double().mean() == pytest.approx(0.3, abs=0.03)
    # A rotation by nothing and a repetition of the last word leave a ninth each as it is.
    assert same == pytest.approx(0.7 * (1 - 0.3 * 8 / 9) ** 2, abs=0.03)
    assert torch.bincount(numbers).tolist() == [100] * 50


def test_yardsticks_are_those_of_a_loop():
    """Pairs anywhere in the clean sentence, words at their place; rows that count for nothing don't."""
    task = opened(sentences())
    batch = {name: value.clone() for name, value in task.held_out.batch(np.arange(20)).items()}
    batch["targets"][4] = -100
    outputs = task.build_model().outputs(batch["inputs"])
    with torch.no_grad():  # better than chance
        outputs.logits.scatter_add_(2, batch["targets"].clamp(min=0)[..., None], 0.6 * torch.rand(20, 6, 1))
    figures, _ = task.figures(task.measure(outputs, batch, torch.zeros(1)))

    rows = [row for row in range(20) if row != 4]
    words, clean = (x[rows].tolist() for x in (outputs.logits.argmax(-1), batch["targets"]))
    hits, pairs, right = 0, 0, 0
    for ours, theirs in zip(words, clean, strict=True):
        known = set(itertools.pairwise(theirs))
        hits += sum(pair in known for pair in itertools.pairwise(ours))
        pairs += 5
        right += sum(a == b for a, b in zip(ours, theirs, strict=True))
    nats = functional.cross_entropy(outputs.logits[rows].flatten(0, 1), batch["targets"][rows].flatten())
    assert 0 < hits < pairs
    assert figures == pytest.approx(
        {
            "eval/pair_precision": hits / pairs,
            "eval/word_accuracy": right / (6 * 19),
            "eval/cross_entropy": nats.item(),
        },
        rel=1e-5,
    )
    assert task.counts(batch) == (19.0, 0.0)
    assert in_sentence(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 1]])).tolist() == [[False, True]]


def test_sequence_losses_need_no_logits():
    """EISL of features and head is that of the logits, in value and gradient."""
    task = opened(sentences({"name": "eisl", "noise": False}))
    batch = task.train.batch(np.arange(30))
    outputs = task.build_model().outputs(batch["inputs"])
    loss = create("eisl", noise=False)
    found = [loss.of(outputs, batch), loss(outputs.logits, batch["targets"])]

    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(
        *(torch.autograd.grad(value, outputs.head.weight, retain_graph=True) for value in found)
    )


def test_clean_sentences_are_learnt_by_heart(tmp_path):
    """By cross-entropy, in which every word stands at its place."""
    data = {**sentences()["data"], "edits": 0.0}
    result = run_training(sentences(steps=60, data=data, checkpoint={"every": 60}), None, str(tmp_path))

    assert result["metrics"]["eval/word_accuracy"] == 1.0
    assert result["metrics"]["eval/pair_precision"] == 1.0


def test_eisl_sees_through_edits(tmp_path):
    """The more often copies are edited, the further it is ahead in pairs of words, after a warm start."""
    data = {"sentences": 30, "length": 8, "words": 50, "copies": 100, "edits": 0.8}
    common = {"steps": 300, "data": data, "checkpoint": {"every": 300}, "evaluation": {"every": 300}}
    warm = [
        {"name": "cross-entropy", "weight": {"value": 1, "final": 0, "start": 100}},
        {"name": "eisl", "orders": [2], "weight": {"value": 0, "final": 1, "start": 100}},
    ]
    plain, through = (
        run_training(sentences(loss, **common), None, str(tmp_path / name))["metrics"]
        for name, loss in (("plain", "cross-entropy"), ("eisl", warm))
    )

    assert through["eval/pair_precision"] > plain["eval/pair_precision"] + 0.03
    assert through["train/loss"] == through["train/loss/eisl"]


def test_a_run_goes_on_from_another_and_after_an_interruption(tmp_path):
    """From words that cross-entropy has found; the noise of EISL goes on where it was, to the last digit."""
    run_in_folder(sentences(steps=30), "words")
    values = sentences("eisl", start="words")
    whole = run_training(values, None, str(tmp_path / "whole"))
    run_training(values, None, str(tmp_path / "parts"), stop_after=4)
    rest = run_training(values, None, str(tmp_path / "parts"))
    cold = run_training(sentences("eisl", steps=3), None, str(tmp_path / "cold"))

    assert losses(rest) == losses(whole)[4:]
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    assert losses(whole)[0] < losses(cold)[0] - 0.5


def test_ranks_and_micro_batches_give_what_one_process_gives(tmp_path):
    """As replicas and with a split table, by a loss of sequences in a sum."""
    values = sentences([{"name": "eisl", "noise": False}, {"name": "cross-entropy", "weight": 0.1}])
    one = run_training(values, None, str(tmp_path / "one"))
    split = {**values, "workers": 2, "batch_size": 40, "micro_batch_size": 7}
    runs = [({**split, "sharding": kind}, str(tmp_path / kind)) for kind in ("ddp", "fsdp")]

    for two in run_ranks(2, run_several, runs, None, folder=tmp_path)[0]:
        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        for name in ("eval/loss", "eval/cross_entropy", "eval/pair_precision"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-3)


def test_an_exported_model_is_evaluated(tmp_path):
    """The folder knows its sentences; it finds what the run found."""
    folder = run_in_folder(sentences(steps=30, checkpoint={"every": 30}))
    export_run(folder, tmp_path / "model")
    found = evaluate_folder(tmp_path / "model").metrics()
    measured = read_all(folder.journal)[-1]["metrics"]

    assert found == pytest.approx({name: measured[name] for name in found}, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "eisl trains task=sentences"),
        (sentences("dco-step"), "dco-step trains task=language-model"),
        (sentences("squared-error"), "squared-error trains task=regression"),
        (sentences(data={"length": 1}), "data.length=1: input should be greater than or equal to 2"),
        (sentences(activation_checkpointing=True), "activation_checkpointing=true is for language models"),
    ],
)
def test_what_does_not_fit_is_refused(values, message):
    """In words, with what would be right."""
    with pytest.raises(UserError) as refused:
        parse_train_spec(values or {"loss": "eisl"})
    assert message in str(refused.value)
