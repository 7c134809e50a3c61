"""Preference degrees: key phrases, thinned answers, the head, and its accuracy beside that of lengths."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossworks.data.answers import AnswerRecord, answered
from lossworks.data.answers.key_phrases import degraded, key_phrases
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.models import Outputs, Transformer
from lossworks.models.interface import Head
from lossworks.specs import ModelSpec
from lossworks.tasks import parse_train_spec
from lossworks.tasks.text.preferences import with_degrees, with_mismatched
from lossworks_testing.training import last_evaluation, run_in_folder

PARAGRAPH = (
    "Compatibility of systems of linear constraints over the set of natural numbers. "
    "Criteria of compatibility of a system of linear Diophantine equations, strict inequations, "
    "and nonstrict inequations are considered."
)


def is_subsequence(shorter: str, longer: str) -> bool:
    rest = iter(longer)
    return all(character in rest for character in shorter)


def test_key_phrases_of_a_known_paragraph() -> None:
    found = [(phrase.text, round(phrase.score, 2)) for phrase in key_phrases(PARAGRAPH)]
    assert found == [
        ("linear diophantine equations", 8.5),
        ("linear constraints", 4.5),
        ("natural numbers", 4.0),
        ("strict inequations", 4.0),
        ("nonstrict inequations", 4.0),
        ("compatibility", 1.0),
        ("systems", 1.0),
        ("set", 1.0),
        ("criteria", 1.0),
        ("system", 1.0),
        ("considered", 1.0),
    ]


@given(st.text(alphabet="ab cd.,the of\n", max_size=80), st.integers(2, 5))
def test_every_version_is_a_subsequence_of_the_one_before(text: str, degrees: int) -> None:
    phrases = key_phrases(text)
    versions = [degraded(text, phrases, degree, degrees) for degree in range(degrees)]
    assert versions[0] == text
    assert all(is_subsequence(after, before) for before, after in itertools.pairwise(versions))


def test_answers_with_too_few_phrases_have_no_degrees() -> None:
    records = [
        AnswerRecord("a", (answered("p", PARAGRAPH), answered("p", "no"))),
        AnswerRecord("b", (answered("p", "short"), answered("p", "no"))),
    ]
    full, thin = with_degrees(records, 3)
    assert full.numbers["degrees"] == (0, -100, 1, 2)
    lengths = [sum(len(span.text) for span in example if span.counts) for example in full.candidates]
    assert lengths[0] > lengths[2] > lengths[3] > 0
    assert thin.numbers["degrees"] == (-100,) * 4
    assert thin.candidates[2:] == ((), ())
    both = with_mismatched([full, thin])[0]
    assert both.numbers == {"degrees": (0, -100, 1, 2, -100), "mismatched": (0, 0, 0, 0, 1)}


def made(width: int = 8) -> Any:
    loss = create("spo-degree", reduction="mean")
    loss.fit_to(Transformer(ModelSpec(layers=1, width=width, heads=2), vocab_size=16))
    return loss


def test_it_begins_at_log_k_and_reads_the_last_token_of_the_answer() -> None:
    loss = made()
    hidden = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.ones(2, 3, 5, dtype=torch.int64)
    targets[:, :, 0] = -100
    targets[0, :, 3:] = -100
    batch = {"targets": targets, "degrees": torch.tensor([[0, 1, 2], [0, -100, 2]])}
    outputs = Outputs(hidden, Head(torch.zeros(16, 8)))
    assert loss.of(outputs, batch).item() == pytest.approx(math.log(3))
    assert loss.elements(batch) == 5
    torch.nn.init.normal_(loss.head.weight, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(loss.of(outputs, batch), hidden)
    reached = gradient.abs().sum(-1) > 0
    expected = torch.zeros(2, 3, 5, dtype=torch.bool)
    expected[0, :, 2], expected[1, 0, 4], expected[1, 2, 4] = True, True, True
    assert torch.equal(reached, expected)


def values(file: Path, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "task": "preferences",
        "workers": 1,
        "sharding": "none",
        "steps": 40,
        "batch_size": 8,
        "optimizer": {"lr": 0.01},
        "loss": [{"name": "dpo"}, {"name": "spo-degree", "weight": 1.0}],
        "model": {"layers": 1, "width": 16, "heads": 2},
        "data": {"corpus": f"preferences:{file}", "vocab_size": 280, "sequence_length": 96},
        "analyses": ["degree-accuracy"],
        "evaluation": {"every": 40},
        "tracking": {"model": False},
    }
    return {**base, **changes}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    colours, things = ("red", "green", "blue", "grey"), ("stone", "river", "cloud", "house")
    records = [
        {
            "prompt": f"{colour} {thing} {n}:",
            "chosen": f"the {colour} {thing} of the old town, and the {thing} by the sea",
            "rejected": "nothing at all",
        }
        for colour in colours
        for thing in things
        for n in range(3)
    ]
    file.write_text("\n".join(json.dumps(record) for record in records))
    return file


def test_degrees_are_learnt_beside_preferences(pairs: Path) -> None:
    found = last_evaluation(run_in_folder(values(pairs), "degrees"))
    assert found["eval/degree_accuracy"] > 0.8
    assert 1 / 3 < found["eval/length_accuracy"] <= 1.0
    assert found["eval/reward_accuracy"] > 0.5


def test_a_weight_of_zero_is_the_preference_loss_alone(pairs: Path) -> None:
    """The copies change nothing that the other loss reads; only the shapes of products do, in rounding."""

    def losses(loss: Any) -> list[float]:
        spec = values(pairs, loss=loss, steps=4, analyses=[], evaluation={"every": 4})
        folder = run_in_folder(spec, f"weight-{len(str(loss))}")
        rows = [json.loads(line)["metrics"] for line in folder.journal.read_text().splitlines()]
        return [row.get("train/loss/dpo", row.get("train/loss")) for row in rows if "train/loss" in row]

    both = losses([{"name": "dpo"}, {"name": "spo-degree", "weight": 0.0}])
    assert both == pytest.approx(losses("dpo"), rel=1e-5)


def test_no_loss_that_tells_degrees_is_refused(pairs: Path) -> None:
    with pytest.raises(UserError, match="add spo-degree to the losses"):
        parse_train_spec(values(pairs, loss="dpo"))
