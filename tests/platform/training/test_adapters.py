"""Low-rank adapters: what is trained, what is merged, and what a model gives."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lossworks.errors import UserError
from lossworks.models import Transformer, load_model
from lossworks.models.huggingface import HuggingFaceModel
from lossworks.specs import ModelSpec
from lossworks.specs.optimisation import LoraSpec
from lossworks.training.weights.adapters import add_adapters, merged
from lossworks.training.weights.export import export_run
from lossworks_testing.training import last_evaluation, run_in_folder

SPEC = ModelSpec(layers=2, width=16, heads=2)
TOKENS = torch.arange(12).reshape(2, 6)


def gpt2() -> HuggingFaceModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=True
    )
    return HuggingFaceModel(GPT2LMHeadModel(config)).eval()


def ours() -> Transformer:
    return Transformer(SPEC, vocab_size=50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [ours, gpt2])
def test_adapters_change_nothing_at_first_and_are_merged_exactly(make: Any) -> None:
    model = make()
    plain = copy.deepcopy(model)
    lora = LoraSpec(rank=3, alpha=6.0)
    add_adapters(model, lora, seed=1)
    assert torch.equal(model.logits(TOKENS), plain.logits(TOKENS))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.endswith(("lora_left", "lora_right")) for name in trained)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    changed = model.logits(TOKENS)
    assert not torch.allclose(changed, plain.logits(TOKENS))
    plain.load_state_dict(merged(model.state_dict(), lora))
    torch.testing.assert_close(plain.logits(TOKENS), changed, rtol=1e-5, atol=1e-5)


def test_gradients_reach_the_adapters_alone() -> None:
    model = ours()
    add_adapters(model, LoraSpec(rank=2, layers=("*.attention.*",)), seed=0)
    model.logits(TOKENS).square().sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {
        f"layers.{layer}.attention.{matrix}.lora_{side}"
        for layer in range(2)
        for matrix in ("qkv", "output")
        for side in ("left", "right")
    }


def test_peft_gives_the_same_for_the_same_factors() -> None:
    peft = pytest.importorskip("peft")
    model, theirs = ours(), ours()
    lora = LoraSpec(rank=2, alpha=4.0)
    add_adapters(model, lora, seed=0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["qkv", "output", "gate_up", "down"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) and hasattr(layer, "lora_left"):
                other = theirs.get_submodule(name)
                layer.lora_left.copy_(torch.randn(layer.lora_left.shape, generator=generator))
                other.lora_A["default"].weight.copy_(layer.lora_right)
                other.lora_B["default"].weight.copy_(layer.lora_left)
    torch.testing.assert_close(model.logits(TOKENS), theirs.logits(TOKENS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (LoraSpec(rank=17), "lora.rank=17: is larger than layers.0.attention.qkv, a matrix of 48 x 16"),
        (LoraSpec(rank=1, layers=("nothing*",)), r"lora.layers: 'nothing\*' fits no linear layer; there are"),
    ],
)
def test_what_fits_no_layer_is_refused(lora: LoraSpec, said: str) -> None:
    with pytest.raises(UserError, match=said):
        add_adapters(ours(), lora, seed=0)


def test_a_run_with_adapters_is_resumed_exported_and_begun_from(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "workers": 1,
        "sharding": "none",
        "steps": 4,
        "batch_size": 4,
        "lora": {"rank": 2},
        "optimizer": {"lr": 0.05},
        "model": {"layers": 1, "width": 16, "heads": 2},
        "data": {"corpus": "facts:12", "vocab_size": 290, "sequence_length": 48},
        "evaluation": {"every": 2},
        "checkpoint": {"every": 2},
        "tracking": {"model": False},
    }
    folder = run_in_folder(values, "adapted")
    export_run(folder, tmp_path / "model", best=False)
    model, _ = load_model(tmp_path / "model")
    assert not any("lora" in name for name in model.state_dict())
    # The next run begins where this one ended: its first evaluation is the last one here, at a rate of ~0.
    again = {**values, "start": str(folder.path), "steps": 1, "optimizer": {"lr": 1e-9}, "lora": 0}
    del again["model"]
    after = run_in_folder({**again, "evaluation": {"every": 1}}, "after")

    # What a run begins from is its best checkpoint.
    losses = [last_evaluation(run)["eval/loss"] for run in (after, folder)]
    assert losses[0] <= losses[1] + 1e-3
