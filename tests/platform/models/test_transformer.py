"""Our own transformer as a whole."""

import math

import pytest
import torch
from torch.nn import functional

from lossworks.models import Head, build_model
from lossworks.specs import ModelSpec

VOCAB = 50
TINY = ModelSpec(layers=2, width=16, heads=4, kv_heads=2, hidden=24, qk_norm=True)
VARIANTS = [
    TINY,
    TINY.model_copy(update={"tied": False, "norm": "layernorm", "activation": "gelu"}),
]


def mean_cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs.logits.flatten(0, 1).float(), batch["targets"].flatten())


def batch(length=12, sequences=2, vocab=VOCAB):
    tokens = torch.randint(vocab, (sequences, length + 1), generator=torch.Generator().manual_seed(1))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def gradients(model, objective=mean_cross_entropy):
    model.zero_grad()
    loss = model(batch(), objective)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("spec", VARIANTS)
@pytest.mark.parametrize("changed", [0, 5, 11])
def test_a_token_changes_nothing_before_it(spec, changed):
    model = build_model(spec, vocab_size=VOCAB, seed=0)
    tokens = batch()["inputs"]
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % VOCAB
    before, after = model.hidden(tokens), model.hidden(other)

    torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-6)
    assert ((after - before)[:, changed:].abs().amax(dim=-1) > 1e-6).all()


def test_forward_is_the_objective_of_outputs_and_batch():
    model = build_model(TINY, vocab_size=VOCAB, seed=0)
    given, seen = batch(), []

    def objective(outputs, batch):
        seen.extend((outputs, batch))
        return outputs.hidden.sum()

    value = model(given, objective)
    outputs, passed = seen

    torch.testing.assert_close(outputs.hidden, model.hidden(given["inputs"]))
    assert outputs.head.weight is model.embedding.weight
    assert passed is given
    torch.testing.assert_close(value, outputs.hidden.sum())
    torch.testing.assert_close(outputs.logits, model.logits(given["inputs"]))
    torch.testing.assert_close(outputs.rerun(given["inputs"]).hidden, outputs.hidden)


def test_head_applies_bias_and_softcap():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    plain = hidden @ weight.T

    torch.testing.assert_close(Head(weight).logits(hidden), plain)
    torch.testing.assert_close(Head(weight, bias).logits(hidden), plain + bias)
    torch.testing.assert_close(Head(weight, None, 2.0).logits(hidden), 2.0 * (plain / 2.0).tanh())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_initial_loss_is_that_of_guessing(tied, activation):
    spec = ModelSpec(layers=4, width=64, heads=4, tied=tied, activation=activation)
    model = build_model(spec, vocab_size=1000, seed=0)

    with torch.no_grad():
        loss = model(batch(length=64, sequences=8, vocab=1000), mean_cross_entropy)

    assert abs(loss.item() - math.log(1000)) < 0.1


def test_initial_scales():
    spec = ModelSpec(layers=8, width=128, heads=4)
    model = build_model(spec, vocab_size=500, seed=0)
    scaled = 0.02 / math.sqrt(16)

    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.blocks():
        assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.feed_forward.gate_up.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.attention.output.weight.std().item() == pytest.approx(scaled, rel=0.05)
        assert block.feed_forward.down.weight.std().item() == pytest.approx(scaled, rel=0.05)
        assert (block.attention_norm.weight == 1).all()


def test_parameter_counts_tied_and_untied():
    def count(tied):
        model = build_model(TINY.model_copy(update={"tied": tied}), vocab_size=VOCAB, seed=0)
        return sum(parameter.numel() for parameter in model.parameters())

    qkv, output, feed_forward, gains = 16 * (16 + 2 * 8), 16 * 16, 3 * 16 * 24, 2 * 16 + 2 * 4
    tied = VOCAB * 16 + 2 * (qkv + output + feed_forward + gains) + 16

    assert count(tied=True) == tied
    assert count(tied=False) == tied + VOCAB * 16


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_a_matrix_parameter_and_twelve_a_score(tied):
    model = build_model(TINY.model_copy(update={"tied": tied}), vocab_size=VOCAB, seed=0)
    matrices = 2 * (16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 24) + VOCAB * 16

    assert model.flops_per_token(128) == 6 * matrices + 12 * 2 * 16 * 128


@pytest.mark.parametrize("spec", VARIANTS)
def test_checkpointing_activations_changes_no_gradient(spec):
    model = build_model(spec, vocab_size=VOCAB, seed=0)
    loss, expected = gradients(model)
    model.checkpoint_activations()
    again, found = gradients(model)

    assert torch.equal(loss, again)
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def test_checkpointing_activations_runs_every_block_twice():
    model = build_model(TINY, vocab_size=VOCAB, seed=0)
    model.checkpoint_activations()
    calls = []
    for block in model.blocks():
        block.attention.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)

    assert len(calls) == 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_give_the_same_gradients(checkpointed):
    model = build_model(TINY, vocab_size=VOCAB, seed=0)
    _, expected = gradients(model)
    if checkpointed:
        model.checkpoint_activations()
    for block in model.blocks():
        block.compile(backend="aot_eager")
    _, found = gradients(model)

    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spec", VARIANTS)
def test_bfloat16_autocast_is_close_to_float32(spec):
    model = build_model(spec, vocab_size=VOCAB, seed=0)
    loss, expected = gradients(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, found = gradients(model)
        hidden = model.hidden(batch()["inputs"])

    assert hidden.isfinite().all()
    torch.testing.assert_close(low, loss, rtol=0, atol=0.01)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


def test_float64_model_rotates_in_float64():
    model = build_model(TINY, vocab_size=VOCAB, seed=0)
    tokens = batch()["inputs"]
    single = model.hidden(tokens)
    double = model.double().hidden(tokens)

    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-4)


def test_model_has_no_buffers_and_takes_any_length():
    model = build_model(TINY, vocab_size=VOCAB, seed=0)

    assert not list(model.buffers())
    assert model.hidden(torch.zeros(1, 3000, dtype=torch.int64)).shape == (1, 3000, 16)
