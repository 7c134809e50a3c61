"""Fine-tuning, preferences and unlearning as tasks, on models of a few thousand parameters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossworks.data.answers import AnswerRecord, answered
from lossworks.errors import UserError
from lossworks.models import load_model
from lossworks.runs import RunFolder
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.tasks.text.unlearning import side_by_side
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks.training.weights.start import settled
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import last_evaluation, run_in_folder, run_training

MODEL = {"layers": 2, "width": 32, "heads": 2}
BASE: dict[str, Any] = {
    "workers": 1,
    "sharding": "none",
    "batch_size": 20,
    "optimizer": {"lr": 0.005},
    "tracking": {"model": False},
}
FACTS = {"corpus": "facts:20", "vocab_size": 300, "sequence_length": 48}


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return the run of a model that knows twenty facts by heart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        spec = {**BASE, "name": "knowing", "steps": 150, "model": MODEL, "data": FACTS}
        return run_in_folder({**spec, "evaluation": {"every": 150}, "checkpoint": {"every": 150}}, "knowing")


def unlearning(knowing: RunFolder, **changes: Any) -> dict[str, Any]:
    values = {
        **BASE,
        "task": "unlearning",
        "start": str(knowing.path),
        "steps": 25,
        "optimizer": {"lr": 0.002},
        "data": {"corpus": "facts:20", "sequence_length": 48},
        "evaluation": {"every": 25},
        "checkpoint": {"every": 25},
    }
    return {**values, **changes}


def test_facts_are_learnt_by_heart(knowing: RunFolder) -> None:
    assert last_evaluation(knowing)["eval/answer_accuracy"] == 1.0


def test_half_of_them_is_forgotten_and_the_other_half_stays(knowing: RunFolder) -> None:
    loss = {"name": "constrained-unlearning", "ceiling": 6.0}
    found = last_evaluation(run_in_folder(unlearning(knowing, loss=loss), "unlearnt"))
    assert found["eval/forget_accuracy"] == 0.0
    assert found["eval/retain_accuracy"] >= 0.9
    plain = {"name": "constrained-unlearning", "least": 0.0, "most": 0.0, "ceiling": 6.0}
    ascent = last_evaluation(run_in_folder(unlearning(knowing, loss=plain), "ascent"))
    assert ascent["eval/retain_accuracy"] < 0.5


def test_siu_gives_other_answers_and_keeps_the_rest(knowing: RunFolder) -> None:
    values = unlearning(knowing, loss="siu", roles={"reference": "start"})
    folder = run_in_folder(values, "siu")
    found = last_evaluation(folder)
    assert found["eval/forget_accuracy"] == 0.0
    assert found["eval/retain_accuracy"] >= 0.9


def test_model_and_tokenizer_are_those_of_the_start(knowing: RunFolder) -> None:
    spec = settled(parse_train_spec(unlearning(knowing)))
    assert spec.model.width == MODEL["width"]  # type: ignore[attr-defined]
    assert spec.data.tokenizer == str((knowing.learnt / "tokenizer.json").absolute())  # type: ignore[attr-defined]
    kept = settled(parse_train_spec(unlearning(knowing, model={**MODEL, "layers": 3})))
    assert kept.model.layers == 3  # type: ignore[attr-defined]


def test_frozen_layers_stay_as_they_were(knowing: RunFolder) -> None:
    only = {"lr": 0.002, "only": ["layers.0.feed_forward.*"]}
    folder = run_in_folder(unlearning(knowing, optimizer=only), "lower")
    before, after = folder.path.parent / "before", folder.path.parent / "after"
    export_run(knowing, before)
    export_run(folder, after, best=False)
    states = [load_model(place)[0].state_dict() for place in (before, after)]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed == {"layers.0.feed_forward.gate_up.weight", "layers.0.feed_forward.down.weight"}


def test_a_pattern_that_fits_nothing_is_refused(knowing: RunFolder) -> None:
    values = unlearning(knowing, optimizer={"only": ["nothing.*"]})
    with pytest.raises(UserError, match=r"optimizer.only: 'nothing.\*' fits no parameter"):
        run_in_folder(values, "wrong")


def test_distance_to_a_model_that_never_saw_is_measured(knowing: RunFolder) -> None:
    other = {**BASE, "name": "unseen", "steps": 5, "model": MODEL, "start": str(knowing.path)}
    other |= {"data": {"corpus": "facts:8", "sequence_length": 48}}
    unseen = run_in_folder({**other, "evaluation": {"every": 5, "sequences": 20}}, "unseen")
    values = unlearning(knowing, roles={"unseen": str(unseen.path)}, steps=1, evaluation={"every": 1})
    found = last_evaluation(run_in_folder(values, "distance"))
    assert found["eval/membership_distance"] > 0


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_preferences_are_learnt(knowing: RunFolder, loss: str, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"n{n}", "chosen": " yes indeed", "rejected": " not at all"} for n in range(40)]
    file.write_text("\n".join(json.dumps(pair) for pair in pairs))
    values = {
        **BASE,
        "task": "preferences",
        "start": str(knowing.path),
        "steps": 30,
        "batch_size": 8,
        "loss": loss,
        "optimizer": {"lr": 0.003},
        "data": {"corpus": f"preferences:{file}", "sequence_length": 32},
        "evaluation": {"every": 30},
    }
    folder = run_in_folder(values, f"aligned-{loss}")
    found = last_evaluation(folder)
    assert found["eval/reward_accuracy"] == 1.0
    assert found["eval/reward_margin"] > 1.0
    # An exported model is measured beside the same reference.
    export_run(folder, tmp_path / "model")
    again = evaluate_folder(tmp_path / "model")
    assert again.yardsticks["eval/reward_margin"] == pytest.approx(found["eval/reward_margin"], rel=1e-4)


@pytest.mark.parametrize(
    "parts",
    [
        {"micro_batch_size": 3},
        pytest.param({"workers": 2, "sharding": "ddp"}, marks=pytest.mark.slow),
        pytest.param({"workers": 2, "sharding": "fsdp"}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("task", ["preferences", "unlearning"])
def test_parts_of_a_batch_give_what_the_whole_gives(
    knowing: RunFolder, tmp_path: Path, task: str, parts: dict[str, Any]
) -> None:
    values = unlearning(knowing, steps=3, evaluation={"every": 3}, batch_size=8)
    if task == "preferences":
        values |= {"task": "preferences", "data": {"corpus": "docstrings", "sequence_length": 64}}
        values["evaluation"] = {"every": 3, "sequences": 10}
    spec = settled(parse_train_spec(values))
    corpus = str(task_of(spec).prepare(spec).folder)
    whole = run_training(spec.model_dump(mode="json"), corpus, str(tmp_path / "whole"))
    split = parse_train_spec({**spec.model_dump(mode="json"), **parts}).model_dump(mode="json")
    ranks = parts.get("workers", 1)
    if ranks == 1:
        other = run_training(split, corpus, str(tmp_path / "split"))
    else:
        other = run_ranks(ranks, run_training, split, corpus, str(tmp_path / "split"), folder=tmp_path)[0]
    for (_, one), (_, two) in zip(whole["rows"], other["rows"], strict=True):
        for name in one:
            if name.startswith(("train/loss", "eval/")):
                assert one[name] == pytest.approx(two[name], rel=2e-4, abs=2e-5), name


def test_a_prompt_in_both_sets_is_refused() -> None:
    records = [AnswerRecord(f"line {n}", (answered(f"p{n}", f"a{n}"),)) for n in range(4)]
    with pytest.raises(UserError, match=r"line 1: its prompt is also to stay \(line 1\)"):
        side_by_side(records[:2], records[1:])
    with pytest.raises(UserError, match="there must be two at least"):
        side_by_side(records[:1], records[1:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"corpus": "forget-and-retain"}}, "needs both forget=pairs:PATH and retain=pairs:PATH"),
        ({"data": {"corpus": "facts:1"}}, "from 2 to 10000"),
        ({"data": {"corpus": "facts:4", "forget": "pairs:a.jsonl"}}, "forget has no effect"),
        ({"loss": "dpo"}, "loss.name=dpo can't train task=unlearning"),
        ({"task": "preferences", "data": {}, "loss": "dpo", "roles": {}}, "set roles.reference=start"),
        ({"loss": "siu"}, "roles: siu reads a companion named reference"),
        ({"lora": 4, "optimizer": {"only": ["x"]}}, "lora.rank=4 can't be combined with optimizer.only"),
    ],
)
def test_wrong_specs_are_refused_in_words(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        parse_train_spec({"task": "unlearning", **changes})
