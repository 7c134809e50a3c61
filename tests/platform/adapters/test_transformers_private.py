"""What is used of transformers besides its documented interface does what it is used for, in this version."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lossworks.adapters.transformers_private import eager_attention


def test_attention_is_eager_inside_and_as_it_was_afterwards():
    """So that an analysis leaves a training as it is."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model, tokens = LlamaForCausalLM(config), torch.tensor([[1, 2, 3]])
    before = model.config._attn_implementation
    with eager_attention(model):
        found = model.base_model(input_ids=tokens, output_attentions=True).attentions

    assert found[0].shape == (1, 2, 3, 3)
    assert before == "sdpa", "the library's default isn't the fused attention any more"
    assert model.config._attn_implementation == before
