"""Tokens with keys and values kept, in batches of unequal prompts: as computing all anew for each alone."""

import itertools

import numpy as np
import pytest
import torch

from lossworks.errors import RunError, UserError
from lossworks.models import build_model
from lossworks.models.generation.sampling import Sampling, stream
from lossworks.specs import ModelSpec

VOCAB = 48
PROMPTS = [[5], [7, 1, 30, 4, 4, 11], [2, 9, 9]]
TINY = ModelSpec(layers=2, width=16, heads=4, kv_heads=2, hidden=24)
VARIANTS = [
    TINY,
    TINY.model_copy(update={"qk_norm": True, "norm": "layernorm", "tied": False, "kv_heads": None}),
    TINY.model_copy(update={"activation": "gelu", "kv_heads": 1}),
    ModelSpec(
        layers=2,
        width=16,
        heads=4,
        norm="none",
        activation="none",
        attention_temperature="exp",
        temperature_positions=7,
    ),
]


def build(spec):
    """Return a model whose logits are far enough apart to choose by."""
    model = build_model(spec, vocab_size=VOCAB, seed=0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
        for block in model.layers:
            if block.attention.temperatures is not None:
                block.attention.temperatures.raw.uniform_(-1, 1)
    return model


def greedily(model, prompt, new_tokens):
    """Return the likeliest tokens behind a prompt, all computed anew for each."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new_tokens):
            tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@torch.no_grad()
def kept_logits(model, tokens, cut):
    """Return the logits behind each token from the one before ``cut``, read singly after a first piece."""
    reader, all_valid = model.reader(len(tokens), tokens.shape[1]), torch.ones_like(tokens, dtype=torch.bool)
    pieces = [(0, cut), *((place, place + 1) for place in range(cut, tokens.shape[1]))]
    found = [reader.read(tokens[:, a:b], all_valid[:, a:b]) for a, b in pieces]
    return model.head().logits(torch.stack(found, dim=1))


@pytest.mark.parametrize("spec", VARIANTS)
def test_kept_keys_and_values_change_no_logit(spec):
    model, tokens = build(spec), torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(
        kept_logits(model, tokens, 5), model.logits(tokens)[:, 4:].detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_batch_of_unequal_prompts_gives_each_what_it_gets_alone(spec):
    """Greedily and drawn, also where rows end one after another."""
    model, seeds = build(spec), [(3, row) for row in range(3)]
    expected = [greedily(model, prompt, 20) for prompt in PROMPTS]
    drawn = model.generate(PROMPTS, 20, temperature=0.9, top_p=0.95, seeds=seeds)
    alone = [
        model.generate([prompt], 20, temperature=0.9, top_p=0.95, seeds=[seed])[0]
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    shorter = model.generate(PROMPTS, 20, temperature=0.0, ended=lambda row, new: len(new) == 4 + 5 * row)

    assert model.generate(PROMPTS, 20, temperature=0.0) == expected
    assert drawn == alone
    assert len({tuple(tokens) for tokens in drawn}) == 3
    assert shorter == [tokens[: 4 + 5 * row] for row, tokens in enumerate(expected)]
    assert model.training is False


@pytest.mark.parametrize("spec", [VARIANTS[0], VARIANTS[3]])
def test_features_are_those_of_documents_apart(spec):
    """The separator among prompt and new tokens; what fills a row in front is in no document."""
    model = build(spec)
    model.isolate(9)
    tokens = torch.tensor([[4, 5, 9, 6, 7, 9, 8, 3], [9, 2, 3, 9, 9, 1, 4, 2]])
    reader = model.reader(2, 8)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1, :2] = False
    with torch.no_grad():
        found = [reader.read(tokens[:, a:b], valid[:, a:b]) for a, b in ((0, 4), (4, 5), (5, 6), (6, 8))]
        expected = [model.hidden(tokens[:1])[0], model.hidden(tokens[1:, 2:])[0]]

    for features, place in zip(found, (3, 4, 5, 7), strict=True):
        torch.testing.assert_close(features[0], expected[0][place], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(features[1], expected[1][place - 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi"])
def test_models_of_transformers_give_each_prompt_what_it_gets_alone(kind, save_hf):
    """With the library's own cache; that of gemma2 is a window of 8 tokens in every other layer."""
    model = build_model(ModelSpec(source=f"hf:{save_hf(kind)}"), vocab_size=VOCAB, seed=0).eval()
    tokens = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))

    torch.testing.assert_close(
        kept_logits(model, tokens, 5), model.logits(tokens)[:, 4:].detach(), rtol=1e-5, atol=1e-5
    )
    expected = [greedily(model, prompt, 16) for prompt in PROMPTS]
    shorter = model.generate(PROMPTS, 16, temperature=0.0, ended=lambda row, new: len(new) == 4 + 5 * row)
    assert model.generate(PROMPTS, 16, temperature=0.0) == expected
    assert shorter == [tokens[: 4 + 5 * row] for row, tokens in enumerate(expected)]


def test_models_of_transformers_that_cannot_are_refused_by_name(save_hf):
    """One that has too few positions, one that keeps a state of another kind, one that mistakes filling."""
    from transformers import MambaConfig

    gpt2 = build_model(ModelSpec(source=f"hf:{save_hf('gpt2')}"), vocab_size=VOCAB, seed=0)
    with pytest.raises(UserError, match="66 tokens of prompt and continuation are more than the 64"):
        gpt2.generate([[1] * 6], 60)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2)
    mamba = build_model(ModelSpec(source=f"hf:{save_hf(config)}"), vocab_size=VOCAB, seed=0)
    with pytest.raises(UserError, match="mamba model: can't generate"):
        mamba.generate([[1, 2]], 3)

    forward = gpt2.model.base_model.forward
    gpt2.model.base_model.forward = lambda attention_mask=None, **given: forward(**given)
    with pytest.raises(UserError, match="gpt2 model: can't generate: with the library's cache"):
        gpt2.generate([[1, 2]], 3)


def choices(p, sampling, count=1000):
    """Return the shares of tokens that evenly spaced numbers choose."""
    logits = torch.tensor(p).log().expand(count, -1)
    draws = [iter([(number + 0.5) / count]) for number in range(count)]
    return np.bincount(sampling.choose(logits, draws), minlength=len(p)) / count


def test_draws_have_the_model_s_probabilities():
    """Those of a temperature are powers, renormalised; each draw takes one number of its row."""
    p = np.array([0.1, 0.5, 0.15, 0.25])

    assert choices(p, Sampling()) == pytest.approx(p, abs=2e-3)
    assert choices(p, Sampling(temperature=0.5)) == pytest.approx(p**2 / (p**2).sum(), abs=2e-3)
    assert choices(p, Sampling(temperature=1e-38)) == pytest.approx([0, 1, 0, 0])
    assert choices(p, Sampling(temperature=0.0)) == pytest.approx([0, 1, 0, 0])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, [1]), (0.6, [1, 3]), (0.8, [1, 3, 2]), (1.0, [1, 3, 2, 0])]
)
def test_top_p_draws_among_the_fewest_that_hold_the_share(top_p, kept):
    p = np.array([0.1, 0.5, 0.15, 0.25])
    nucleus = np.zeros(4)
    nucleus[kept] = p[kept] / p[kept].sum()

    assert choices(p, Sampling(top_p=top_p)) == pytest.approx(nucleus, abs=2e-3)


def test_a_number_next_to_one_chooses_a_token_that_can_be():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    sampling = Sampling()

    assert int(sampling.choose(logits, [iter([1 - 2**-53])])) == 1
    assert int(sampling.choose(logits.flip(1), [iter([0.0])])) == 1


def test_streams_are_uniform_and_follow_their_seed_alone():
    numbers = list(itertools.islice(stream((1, 2)), 4000))

    assert numbers[:9] == list(itertools.islice(stream((1, 2)), 9))
    assert numbers[:9] != list(itertools.islice(stream((1, 3)), 9))
    assert 0 <= min(numbers) < 0.01
    assert 0.99 < max(numbers) < 1
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_generated_is_refused():
    model = build(TINY)

    with pytest.raises(UserError, match="new_tokens=-1: must be at least 0"):
        model.generate([[1]], -1)
    for temperature in (float("nan"), float("inf"), -1.0):
        with pytest.raises(UserError, match=rf"temperature={temperature}: must be at least 0"):
            model.generate([[1]], 1, temperature=temperature)
    with pytest.raises(UserError, match=r"top_p=0\.0: must be above 0 and at most 1"):
        model.generate([[1]], 1, top_p=0.0)
    with pytest.raises(UserError, match="prompts: number 1 is empty"):
        model.generate([[1], []], 1)
    assert model.generate([], 3) == []
    assert model.generate([[1], [2]], 0) == [[], []]
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(RunError, match="logits are not finite"):
        model.generate([[1]], 1)
