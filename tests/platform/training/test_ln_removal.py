"""Norms that are switched off while a decoder is fine-tuned, and folded away when it is exported."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from lossworks.entries.methods.ln_removal import LNRemoval
from lossworks.errors import UserError
from lossworks.models import HuggingFaceModel, build_model, load_model
from lossworks.models.generation.texts import TextGenerator, Writing
from lossworks.models.huggingface import IDENTITY_GAIN
from lossworks.patching.switched_norms import Switchboard, SwitchedNorm, SwitchedNorms, folded
from lossworks.specs import ModelSpec
from lossworks.tasks.text.language_model import LanguageTask
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.weights.export import evaluate_folder, export_run, predict_file
from lossworks.training.weights.start import trained_weights
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import prepared, run_in_folder, run_several, run_training, tiny_spec

VOCABULARY = 40
QUICK = {"name": "ln-removal", "wait": 2, "gap_feed_forward": 1, "gap_attention": 1, "gap_values": 1}
MODELS = {
    "rmsnorm": ModelSpec(layers=2, width=16, heads=4, kv_heads=2, qk_norm=True),
    "layernorm": ModelSpec(layers=2, width=16, heads=2, tied=False, norm="layernorm", activation="gelu"),
    "gpt2": None,
}


def gpt2(vocab_size=VOCABULARY):
    """Return a small GPT-2 without dropout, of the transformers library."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **shape, **dropout))


def drawn(kind, seed=1):
    """Return a model whose gains and biases are anything, with its spec."""
    spec = MODELS[kind] or ModelSpec(source="hf:unused")
    model = HuggingFaceModel(gpt2()) if kind == "gpt2" else build_model(spec, vocab_size=VOCABULARY, seed=0)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    return model.eval(), spec


def removing(text, **changes):
    """Return the values of a run of 26 steps in which all norms of two layers go."""
    values = {"steps": 26, "methods": [QUICK], "evaluation": {"every": 13}, "checkpoint": {"every": 26}}
    return tiny_spec(text, **{**values, **changes}).model_dump(mode="json")


# The norms


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(8), torch.nn.RMSNorm(8, eps=1e-6)])
def test_a_fixed_divisor_is_the_norm_where_every_token_has_that_deviation(norm):
    """And is not where one has another."""
    norm = norm.double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    board = Switchboard(1, special=False)
    switched = SwitchedNorm(norm, board, [0])
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    variance = switched.deviation(x)[..., None].square() - switched.epsilon
    scaled = x * ((1.7**2 - switched.epsilon) / variance).sqrt()
    board.means[0] = 1.7
    board.see(torch.zeros(3, 5, dtype=torch.int64))
    torch.testing.assert_close(switched(scaled), norm(scaled), rtol=0, atol=0)
    board.off[0] = 1

    torch.testing.assert_close(switched(scaled), norm(scaled), rtol=1e-7, atol=1e-7)
    assert (switched(x) - norm(x)).abs().max() > 0.1
    assert set(switched.state_dict()) == set(norm.state_dict())


@pytest.mark.parametrize("kind", list(MODELS))
def test_a_folded_model_is_the_unfolded_one(kind):
    """To 1e-5, with other divisors for values than for queries; its logits are affine in the last stream."""
    model, spec = drawn(kind)
    real = model.logits(torch.arange(30).reshape(2, 15)).detach()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    norms = SwitchedNorms(model, "test", special=False)
    norms.board.means[:] = torch.linspace(0.5, 2.0, len(norms.board.means))[:, None]
    norms.board.off[:] = 1
    tokens = torch.arange(30).reshape(2, 15)
    expected = model.logits(tokens)
    other, _ = drawn(kind)
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    new, tensors = folded(other, spec, norms.board.means)
    if kind == "gpt2":
        plain = gpt2()
        plain.config.layer_norm_epsilon, plain.config.tie_word_embeddings = IDENTITY_GAIN**2, False
        without = HuggingFaceModel(type(plain)(plain.config)).eval()
        final = without.model.transformer.ln_f
    else:
        without = build_model(new, vocab_size=VOCABULARY, seed=3).eval()
        final = without.final_norm
    without.load_state_dict(tensors)

    torch.testing.assert_close(without.logits(tokens), expected, rtol=1e-5, atol=1e-5)
    assert (real - expected).abs().max() > 0.1
    one, other, zero = torch.randn(5, 16), 40 * torch.randn(5, 16), torch.zeros(5, 16)
    if kind == "gpt2":  # its norm centres what is centred already
        one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
    a, b, both, none = (without.head().logits(final(x)) for x in (one, other, one + other, zero))
    torch.testing.assert_close(both, a + b - none, rtol=1e-4, atol=1e-4)


def test_a_norm_of_a_large_epsilon_takes_nothing_away():
    """In float32 and bfloat16 to their last digits; float16 can't hold it."""
    x = torch.randn(6, 64)
    x = x - x.mean(1, keepdim=True)

    def kept(dtype):
        gain = torch.full((64,), IDENTITY_GAIN).to(dtype)
        return functional.layer_norm(x.to(dtype), (64,), gain, None, IDENTITY_GAIN**2)

    torch.testing.assert_close(kept(torch.float32), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept(torch.bfloat16).float(), x, rtol=0.01, atol=0.01)
    assert not kept(torch.float16).isfinite().all()


# The schedule and the loss


def test_norms_go_in_the_order_of_the_paper():
    """Feed-forward layers, queries and keys, values, the final norm; then special tokens."""
    found = LNRemoval(wait=20).schedule(3)

    assert found == [20, 22, 24, 26, 28, 30, 32, 35, 38, 41, 43, 53]
    at_once = LNRemoval(wait=5, gap_feed_forward=0, gap_attention=0, gap_values=0)
    assert at_once.schedule(2) == [5] * 7 + [7, 17]


def test_special_tokens_have_divisors_of_their_own_until_they_are_merged():
    """First tokens, and those that end texts; without any seen, they have the common one."""
    board = Switchboard(1, special=True)
    board.end = 7
    board.means[0] = torch.tensor([1.0, 3.0, 5.0])
    board.see(torch.tensor([[7, 7, 1], [1, 2, 7]]))
    like = torch.zeros(1)
    assert board.divisor(0, like) is None
    board.off[0] = 1
    assert board.divisor(0, like)[..., 0].tolist() == [[3, 5, 1], [3, 1, 5]]
    board.off[1] = 1
    assert board.divisor(0, like)[..., 0].tolist() == [[3, 1, 1], [3, 1, 1]]
    board.off[2] = 1
    assert board.divisor(0, like).item() == 1


def test_the_auxiliary_loss_is_in_the_gradient(text):
    """λ times the mean square of deviations about the running mean, of tokens that count; not in values."""
    spec = tiny_spec(text)
    task = LanguageTask.open(spec, None)
    rows = torch.arange(4).numpy()
    batch = {name: value.clone() for name, value in task.train.batch(rows).items()}
    batch["targets"][0, 5:] = -100
    gradients = []
    for auxiliary in (0.0, 0.25):
        model, method = task.build_model().train(), LNRemoval(auxiliary=auxiliary)
        method.fit_to(task, model)
        method._norms.board.means[-1, 0] = 0.03  # as if it had run
        sums = model(batch, lambda outputs, of, m=method: m.loss(outputs, of, task.objective))
        sums.sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        values = float(sums.detach())
    model = task.build_model().train()
    plain = float(model(batch, task.objective).detach())
    x = model.embedding(batch["inputs"])
    seen = {}
    model.final_norm.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    model.hidden(batch["inputs"])
    deviations = (seen["x"].square().mean(-1) + 1e-6).sqrt()
    term = 0.25 * ((deviations - 0.03).square() * (batch["targets"] != -100)).sum()
    expected = torch.autograd.grad(term, list(model.parameters()), materialize_grads=True, allow_unused=True)

    assert x.shape == (4, 16, 16)
    assert values == pytest.approx(plain, rel=1e-6)
    for without, with_it, own in zip(*gradients, expected, strict=True):
        torch.testing.assert_close(with_it - without, own, rtol=1e-3, atol=1e-6)


def means_of(values, corpus, folder):
    """Train, and return the state that the method has kept at the end."""
    result = run_training(values, corpus, folder)
    return {
        name: value.tolist()
        for name, value in tensors_in(Path(result["checkpoint"]), "methods.ln-removal.").items()
    }


def test_running_means_advance_once_a_step(text, tmp_path):
    """However a batch is split, over micro-batches or ranks, with activations computed again, evaluated."""
    method = {**QUICK, "remove": False, "wait": 1}
    common = {"steps": 3, "methods": [method], "checkpoint": {"every": 3}, "optimizer": {"lr": 1e-12}}
    specs = {
        "whole": tiny_spec(text, **common),
        "split": tiny_spec(text, **common, micro_batch_size=2, evaluation={"every": 1}),
        "again": tiny_spec(text, **common, activation_checkpointing=True),
        "bf16": tiny_spec(text, **common, precision="bf16"),
    }
    corpus = str(prepared(specs["whole"]).folder)
    found = {
        name: means_of(spec.model_dump(mode="json"), corpus, str(tmp_path / name))
        for name, spec in specs.items()
    }
    # From the model as it begins, which learns next to nothing.
    task = LanguageTask.open(specs["whole"], Path(corpus))
    model, seen = task.build_model().eval(), []
    model.final_norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean = 0.0
    for step in range(3):
        batch = task.train.batch(task.order().rows(step * 6, 0, 1))
        model.hidden(batch["inputs"])
        deviations = (seen[-1].detach().double().square().mean(-1) + 1e-6).sqrt()
        ordinary = batch["inputs"] != task.corpus.end_of_text
        ordinary[:, 0] = False
        own = float(deviations[ordinary].mean())
        mean = own if step == 0 else 0.9 * mean + 0.1 * own
    assert found["whole"]["means"][-1][0] == pytest.approx(mean, rel=1e-6)
    for name, state in found.items():
        rel = 0.01 if name == "bf16" else 1e-5
        for ours, theirs in zip(state["means"], found["whole"]["means"], strict=True):
            assert ours == pytest.approx(theirs, rel=rel), name
        assert state["off"] == [0] * 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_agree_on_running_means(kind, text, tmp_path):
    """They have those of one process, and end up with all norms off."""
    alone = removing(text)
    corpus = str(prepared(tiny_spec(text)).folder)
    found = means_of(alone, corpus, str(tmp_path / "alone"))
    spread = {**alone, "workers": 2, "sharding": {"kind": kind}}
    one, other = run_ranks(2, means_of, spread, corpus, str(tmp_path / kind), folder=tmp_path)

    assert one == other
    assert one["off"] == found["off"] == [1] * 9
    for ours, theirs in zip(one["means"], found["means"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)


# Runs


def test_the_control_trains_as_without_the_method(text, tmp_path):
    """Bit for bit; it has the same figures."""
    values = tiny_spec(text).model_dump(mode="json")
    control = {**values, "methods": [{**QUICK, "remove": False}]}
    corpus = str(prepared(tiny_spec(text)).folder)
    plain, same = run_several([(values, str(tmp_path / "a")), (control, str(tmp_path / "b"))], corpus)

    rows = [row for _, row in same["rows"] if "train/loss" in row]
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for _, row in plain["rows"]]
    assert same["metrics"]["removal/on"] == 5
    assert same["metrics"]["removal/tail"] > same["metrics"]["eval/cross_entropy"]


@pytest.mark.parametrize("kind", ["ours", "gpt2"])
def test_a_removal_goes_on_where_it_was_stopped_and_is_exported(kind, text, tmp_path, monkeypatch):
    """Bit for bit, between any switches; what is exported gives the run's own held-out loss and no norms."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    changes = {}
    corpus = prepared(tiny_spec(text))
    if kind == "gpt2":
        gpt2(corpus.vocab_size).save_pretrained(tmp_path / "hf")
        changes["model"] = {"source": f"hf:{tmp_path / 'hf'}"}
        base = tiny_spec(text).model_dump(mode="json")
        base["model"] = changes["model"]
        base["data"]["tokenizer"] = str(corpus.tokenizer_path)
    else:
        base = tiny_spec(text).model_dump(mode="json")
    values = base | {
        "steps": 26,
        "methods": [QUICK],
        "evaluation": {"every": 13, "sequences": 7},
        "checkpoint": {"every": 26},
        "optimizer": {"lr": 0.003},
    }
    whole = run_training(values, None, str(tmp_path / "whole"))
    for stop in (3, 5, 11):
        run_training(values, None, str(tmp_path / f"parts{stop}"), stop_after=stop)
        rest = run_training(values, None, str(tmp_path / f"parts{stop}"))
        for prefix in ("model.", "methods.ln-removal.", "optimizer.state."):
            ours, theirs = (tensors_in(Path(result["checkpoint"]), prefix) for result in (whole, rest))
            assert ours
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole["metrics"]["removal/on"] == 0

    folder = run_in_folder(values)
    export_run(folder, tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model")
    found = evaluate_folder(tmp_path / "model", limit=7).loss
    assert found == pytest.approx(whole["metrics"]["eval/cross_entropy"], rel=1e-5)
    assert trained_weights(str(folder.path), "start").model["norm"] == "none"
    ((written,),) = TextGenerator.load(tmp_path / "model").continuations(["def"], Writing(tokens=3))
    assert isinstance(written.text, str)
    (tmp_path / "some.txt").write_text("a line of text\n")
    assert predict_file(str(folder.path), tmp_path / "some.txt").columns["nats per token"][0] > 0
    if kind == "gpt2":
        from transformers import AutoModelForCausalLM

        tokens = torch.tensor([tokenizer.encode("def f(x)").ids])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        torch.testing.assert_close(plain(tokens).logits, model.logits(tokens), rtol=1e-5, atol=1e-5)
        assert not plain.transformer.h[0].ln_1.bias.any()
    else:
        assert not any("norm" in name for name in model.state_dict())


def test_a_checkpoint_with_norms_left_is_not_exported(text, tmp_path, monkeypatch):
    """It says how to go on."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    folder = run_in_folder(removing(text, steps=22))
    values = folder.spec().model_dump(mode="json") | {"steps": 40}
    values["methods"] = [{**QUICK, "wait": 18}]
    folder.store(type(folder.spec()).parse(values))  # as if it had been stopped

    state = tensors_in(next(folder.checkpoints.glob("step-*")), "methods.ln-removal.")
    assert not (state["off"] == 0).any()
    method = LNRemoval()
    with pytest.raises(UserError, match=r"its newest checkpoint is of before the schedule's end.*--resume"):
        method.exported(folder.spec(), {}, {"off": torch.tensor([1, 0]), "means": state["means"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 10}, "with 2 layers its schedule ends at step 21; steps=10 must be at least so many"),
        ({"compile": True}, "changes blocks while they are trained: compile must be false"),
        ({"model": {"norm": "none"}}, "model.norm=none has no norms to remove"),
        ({"loss": ["cross-entropy", "log-z"]}, "adds to one loss of rows, such as cross-entropy, not to"),
    ],
)
def test_what_can_not_be_is_refused(text, changes, message):
    """Before anything starts."""
    with pytest.raises(UserError) as refused:
        removing(text, **changes)
    assert message in str(refused.value)


def test_other_architectures_are_refused_by_name(text, tmp_path):
    """From the configuration alone; so are models of other tasks."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"gpt2 .* not of llama models"):
        removing(text, model={"source": f"hf:{tmp_path}", "layers": 4, "width": 256, "heads": 4})
    from lossworks.tasks import parse_train_spec

    with pytest.raises(UserError, match="takes norms out of language models, not of models of task=classif"):
        parse_train_spec({"task": "classification", "methods": ["ln-removal"]})
