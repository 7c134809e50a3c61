"""Tiny models of the transformers library and a tiny tokenizer, made on the spot."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

HF_VOCAB = 48


def _llama():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=HF_VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def _gpt2():
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=HF_VOCAB,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _gemma2():
    from transformers import Gemma2Config

    return Gemma2Config(
        vocab_size=HF_VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        final_logit_softcapping=0.5,  # small, so that the cap shows
        query_pre_attn_scalar=8,
    )


def _phi():
    from transformers import PhiConfig

    return PhiConfig(  # its head has a bias
        vocab_size=HF_VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )


CONFIGS = {"llama": _llama, "gpt2": _gpt2, "gemma2": _gemma2, "phi": _phi}


@pytest.fixture
def save_hf(tmp_path):
    """Return a function that saves a random model and returns its folder."""

    def save(kind_or_config) -> Path:
        from transformers import AutoModelForCausalLM

        config = CONFIGS[kind_or_config]() if isinstance(kind_or_config, str) else kind_or_config
        folder = tmp_path / f"hf-{config.model_type}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config)
            # The library's zero biases and unit gains would hide a forgotten one.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def tokenizer_path(tmp_path) -> Path:
    words = {f"w{index}": index for index in range(32)}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "made-tokenizer.json"
    tokenizer.save(str(path))
    return path
