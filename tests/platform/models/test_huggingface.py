"""Checkpoints of the transformers library behind our interface."""

import json

import pytest
import torch
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models import build_model
from lossworks.specs import ModelSpec

KINDS = ["llama", "gpt2", "gemma2", "phi"]
TOKENS = torch.randint(48, (2, 13), generator=torch.Generator().manual_seed(1))
BATCH = {"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:]}


def build(folder, vocab_size=48, **fields):
    return build_model(ModelSpec(source=f"hf:{folder}", **fields), vocab_size=vocab_size, seed=0)


def mean_cross_entropy(outputs, batch):
    return functional.cross_entropy(outputs.logits.flatten(0, 1), batch["targets"].flatten())


def gradients(model):
    model.zero_grad()
    model(BATCH, mean_cross_entropy).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_and_head_give_the_library_s_logits_and_loss(kind, save_hf):
    from transformers import AutoModelForCausalLM

    folder = save_hf(kind)
    expected = AutoModelForCausalLM.from_pretrained(folder)(input_ids=TOKENS, labels=TOKENS)
    model = build(folder)

    torch.testing.assert_close(model.logits(TOKENS), expected.logits)
    loss = model(BATCH, mean_cross_entropy)
    torch.testing.assert_close(loss, expected.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_nothing_before_it(kind, save_hf):
    model = build(save_hf(kind))
    other = TOKENS.clone()
    other[:, 6] = (other[:, 6] + 1) % 48

    torch.testing.assert_close(model.hidden(other)[:, :6], model.hidden(TOKENS)[:, :6], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_activations_changes_no_gradient(kind, save_hf):
    model = build(save_hf(kind))
    expected = gradients(model)
    model.checkpoint_activations()
    found = gradients(model)

    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_blocks_head_and_softcap(save_hf):
    llama, gemma2 = build(save_hf("llama")), build(save_hf("gemma2"))

    assert [type(block).__name__ for block in llama.blocks()] == ["LlamaDecoderLayer"] * 2
    assert llama.head().softcap is None
    assert llama.head().bias is None
    assert gemma2.head().softcap == 0.5
    assert gemma2.head().weight is gemma2.model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("kind", "matrices"),
    [
        ("llama", 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 24) + 48 * 16),
        ("gpt2", 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 48 * 16),  # positions are looked up, not multiplied
    ],
)
def test_flops_count_matrices_and_attention(kind, matrices, save_hf):
    assert build(save_hf(kind)).flops_per_token(32) == 6 * matrices + 12 * 2 * 16 * 32


def test_flops_are_unknown_without_the_configuration_s_fields(save_hf):
    model = build(save_hf("llama"))
    model.config = object()

    assert model.flops_per_token(32) is None


def test_generation_switches_dropout_off(save_hf):
    model = build(save_hf("gpt2"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    found = [model.generate(TOKENS[:, :4].tolist(), 6) for _ in range(2)]

    assert found[0] == found[1]
    assert model.training


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_models_of_transformers_give_entropies_of_their_own_probabilities(kind, save_hf):
    model = build_model(ModelSpec(source=f"hf:{save_hf(kind)}"), vocab_size=48, seed=0).eval()
    before = model.model.config._attn_implementation
    outputs = model.outputs(TOKENS)
    found = outputs.attention_entropies
    assert model.model.config._attn_implementation == before
    model.observe_attention()
    again = model.outputs(TOKENS)
    probabilities = model.model(input_ids=TOKENS, output_attentions=True).attentions

    assert found.shape == (2, *model.attention_shape(), 13)
    torch.testing.assert_close(again.hidden, outputs.hidden)
    torch.testing.assert_close(found, torch.stack([torch.special.entr(p).sum(-1) for p in probabilities], 1))
    torch.testing.assert_close(again.attention_entropies, found)
    model.config.attention_dropout = 0.1
    with pytest.raises(UserError, match=r"with attention_dropout=0\.1: dropout changes the attention"):
        model.observe_attention()


def test_a_smaller_tokenizer_is_fine_and_a_larger_one_is_not(save_hf):
    folder = save_hf("llama")

    assert build(folder, vocab_size=40).head().weight.shape == (48, 16)
    with pytest.raises(UserError, match="the tokenizer has 49 entries and the model only 48"):
        build(folder, vocab_size=49)


def test_sizes_that_the_checkpoint_decides_are_refused_by_name(save_hf):
    folder = save_hf("llama")

    with pytest.raises(UserError, match=rf"model\.layers has no effect with model\.source=hf:{folder}"):
        build(folder, layers=7)


def test_a_stored_resolved_spec_can_be_built_again(save_hf):
    spec = ModelSpec(source=f"hf:{save_hf('llama')}")
    stored = ModelSpec.parse(spec.model_dump(mode="json"))

    assert stored.model_fields_set > {"layers"}
    build_model(stored, vocab_size=48, seed=0)


def test_missing_folder_and_configuration(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        build(tmp_path)


def test_pickled_weights_are_refused_and_never_opened(save_hf):
    folder = save_hf("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(UserError, match=r"only as \.bin \(pickle\).*convert them to safetensors"):
        build(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="has no weights"):
        build(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "never-heard-of"}'])
def test_unusable_configuration(content, save_hf):
    folder = save_hf("llama")
    (folder / "config.json").write_text(content)

    with pytest.raises(UserError, match="can't be loaded as a causal language model") as caught:
        build(folder)
    assert "\n" not in str(caught.value)


def test_truncated_weights(save_hf):
    folder = save_hf("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    with pytest.raises(UserError, match="can't be loaded as a causal language model"):
        build(folder)


def test_weights_of_another_shape_are_named(save_hf):
    folder = save_hf("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))

    with pytest.raises(
        UserError,
        match=r"another shape: model\.layers\.0\.mlp\.\w+\.weight is \(.*24.*\) in the file and \(.*32.*\)",
    ):
        build(folder)


def test_lacking_weights_are_named(save_hf):
    folder = save_hf("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))

    with pytest.raises(UserError, match=r"the weights lack model\.layers\.2\."):
        build(folder)


def test_scaled_logits_are_refused_by_name(save_hf):
    from transformers import CohereConfig

    config = CohereConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        logit_scale=0.5,
        bos_token_id=1,
        eos_token_id=2,
    )

    with pytest.raises(UserError, match=r"cohere model with logit_scale=0\.5"):
        build(save_hf(config))


def test_logits_that_no_setting_explains_are_refused(save_hf, monkeypatch):
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def doubled(self, **inputs):
        output = forward(self, **inputs)
        output.logits = 2.0 * output.logits
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)

    with pytest.raises(UserError, match="compute their logits not by a linear head"):
        build(save_hf("llama"))


def test_activation_checkpointing_of_an_architecture_without_it(save_hf):
    model = build(save_hf("llama"))
    model.model.supports_gradient_checkpointing = False

    with pytest.raises(UserError, match="activation_checkpointing=true: llama models don't support it"):
        model.checkpoint_activations()
