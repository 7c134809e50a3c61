"""Causal tracing: what noise takes away, what restored states bring back, and whose facts are traced."""

import json
from pathlib import Path

import pytest
import torch

from lossworks.cli import main
from lossworks.data.answers.facts import Fact, facts_of, read_facts
from lossworks.entries.analyses.causal_tracing import STATES, TracedFact, Tracer, window
from lossworks.errors import UserError
from lossworks.models import HuggingFaceModel, build_model
from lossworks.specs import ModelSpec
from lossworks.tasks import parse_train_spec
from lossworks.training.analysing import analyse
from lossworks_testing.training import run_in_folder, tiny_spec

FACT = TracedFact(torch.tensor([1, 5, 7, 9, 11]), torch.tensor([3, 4]), range(1, 3))


def model_of(kind):
    """Return a model whose weights are large enough for noise to matter."""
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        ends = {"bos_token_id": 0, "eos_token_id": 0}
        torch.manual_seed(0)
        model = HuggingFaceModel(GPT2LMHeadModel(GPT2Config(vocab_size=20, **shape, **ends)))
    else:
        model = build_model(ModelSpec(layers=2, width=16, heads=2), vocab_size=20, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model.eval()


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
@torch.no_grad()
def test_what_is_restored_is_all_that_comes_back(kind):
    """Everything gives the clean run, nothing the damaged one, and without noise nothing changes."""
    model = model_of(kind)
    tracer = Tracer(model, model.outputs)
    clean, _, states = tracer.clean(FACT)
    noise = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    damaged = tracer.damaged(FACT, noise, states)
    layers = range(tracer.layers)
    everywhere = [None] * 3

    p = model.logits(torch.tensor([[1, 5, 7, 9, 11]])).double().softmax(-1)[0, -1]
    assert clean == pytest.approx(float(p[3]), rel=1e-5)
    assert (damaged - clean).abs().min() > 1e-6
    whole = tracer.damaged(FACT, noise, states, [("residual stream", layers, everywhere)])
    torch.testing.assert_close(whole, torch.full((3,), clean, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    for state in STATES:
        assert torch.equal(tracer.damaged(FACT, noise, states, [(state, [], everywhere)]), damaged)
        quiet = tracer.damaged(FACT, 0 * noise, states, [(state, [0], [2, 2, 2])])
        torch.testing.assert_close(quiet, torch.full((3,), clean, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    # The last block's state at the last position is all that the head reads.
    last = tracer.damaged(FACT, noise, states, [("residual stream", [1], [4, 4, 4])])
    torch.testing.assert_close(last, whole)
    # An early token's state behind the last block is read by nothing.
    torch.testing.assert_close(
        tracer.damaged(FACT, noise, states, [("residual stream", [1], [1, 1, 1])]), damaged
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_windows_are_cut_off_at_the_ends():
    """As those of the paper, ten layers about one of 48."""
    assert window(20, 10, 48) == range(15, 25)
    assert window(2, 10, 48) == range(7)
    assert window(47, 10, 48) == range(42, 48)
    assert [list(window(layer, 1, 3)) for layer in range(3)] == [[0], [1], [2]]


def written(path, facts):
    """Write facts as JSONL."""
    path.write_text("".join(json.dumps(fact._asdict()) + "\n" for fact in facts))
    return path


def test_facts_are_read_and_made_up(tmp_path):
    """Each key once, each value once; what is written is read again."""
    facts = facts_of("facts:40")

    assert facts_of(str(written(tmp_path / "facts.jsonl", facts))) == facts
    assert len({fact.subject for fact in facts}) == len({fact.answer for fact in facts}) == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no facts"),
        ("{", "line 1: is no JSON"),
        ('{"prompt": "A is", "subject": "A"}', "line 1: answer=None must be a text"),
        ('{"prompt": "A is", "subject": "B", "answer": " c"}', "the subject 'B' is not in the prompt 'A is'"),
        ("[1]", "line 1: prompt=None must be a text"),
    ],
)
def test_damaged_facts_are_refused(tmp_path, text, message):
    """With the file and the line."""
    (tmp_path / "facts.jsonl").write_text(text)
    with pytest.raises(UserError) as refused:
        read_facts(tmp_path / "facts.jsonl")
    assert message in str(refused.value)
    with pytest.raises(UserError, match="can't be read"):
        read_facts(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"analyses": ["causal-tracing"]}, "causal-tracing: facts is not set; give a JSONL file"),
        (
            {"analyses": [{"name": "causal-tracing", "facts": "x"}], "sharding": "fsdp"},
            "looks into blocks: sharding must be ddp or none",
        ),
        (
            {"task": "classification", "analyses": [{"name": "causal-tracing", "facts": "x"}]},
            "traces language models, not models of task=classification",
        ),
        ({"analyses": [{"name": "causal-tracing", "facts": 3}]}, "facts=3 must be a text, or null"),
    ],
)
def test_what_can_not_be_traced_is_refused(values, message):
    """Before anything starts."""
    with pytest.raises(UserError) as refused:
        parse_train_spec(values)
    assert message in str(refused.value)


@pytest.mark.slow
def test_a_model_that_knows_facts_is_traced_by_the_command(tmp_path, monkeypatch, capsys):
    """Whoever knows none says so and gives no figure; those that are not known are counted and named."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    facts = facts_of("facts:20")
    values = tiny_spec(
        tmp_path,
        steps=200,
        batch_size=20,
        data={"corpus": "facts:20", "sequence_length": 48},
        model={"layers": 3, "width": 48, "heads": 4},
        optimizer={"lr": 0.01},
        evaluation={"every": 300},
        checkpoint={"every": 300},
    ).model_dump(mode="json")
    folder = run_in_folder(values)
    path = "facts:20"
    others = [Fact("Nobody keeps the", "Nobody", " secret")]
    more = written(tmp_path / "more.jsonl", [*facts, *others])
    assert main(["analyse", "causal-tracing", str(folder.path), f"facts={more}"]) == 0
    printed = capsys.readouterr().out

    found = json.loads((folder.path / "causal-tracing.json").read_text())
    figures = found["figures"]
    assert 15 <= figures["known_facts"] <= 20
    assert f"does not answer {21 - figures['known_facts']:.0f} of 21 facts" in printed
    assert "Nobody" in printed
    assert "MLPs that matter: layer" in printed
    assert figures["answer_probability"] > 0.5
    assert figures["answer_probability_under_noise"] < figures["answer_probability"] - 0.2
    # At the last token the stream behind the last block brings all back.
    gap = figures["answer_probability"] - figures["answer_probability_under_noise"]
    assert found["pictured"]["effects"][0][2][-1] == pytest.approx(gap, abs=1e-5)
    assert 0 < figures["effect_mlp"] < gap
    assert (folder.path / "causal-tracing.png").stat().st_size > 10000
    again = analyse("causal-tracing", [folder], {"facts": str(path)}, to=tmp_path / "a").finding
    same = analyse("causal-tracing", [folder], {"facts": str(path)}, to=tmp_path / "b").finding
    assert again == same
    unknown = written(tmp_path / "none.jsonl", others)
    none = analyse("causal-tracing", [folder], {"facts": str(unknown)}).finding
    assert none.figures == {"known_facts": 0.0}
    assert none.notes[-1] == "It knows none, so that nothing is traced."
    quiet = analyse("causal-tracing", [folder], {"facts": str(path), "noise": 0.0}, to=tmp_path / "c").finding
    assert all(abs(v) < 1e-6 for v in torch.tensor(quiet.pictured["effects"]).flatten().tolist())
    assert Path(tmp_path / "c" / "causal-tracing.png").exists()
