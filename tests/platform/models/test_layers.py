"""Rotary positions, norms and attention, each against what its paper promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lossworks.models.layers import (
    GELU,
    Attention,
    Block,
    SwiGLU,
    make_feed_forward,
    make_norm,
    rotate,
    rotation,
)
from lossworks.specs import ModelSpec

TINY = ModelSpec(layers=1, width=8, heads=2, hidden=12)


def angles(length, features, dtype=torch.float64):
    return rotation(torch.arange(length, dtype=dtype), features, 10000.0)


@settings(deadline=None, max_examples=25)
@given(query=st.integers(0, 20), key=st.integers(0, 20), shift=st.integers(0, 200))
def test_rotary_scores_depend_on_relative_positions_only(query, key, shift):
    torch.manual_seed(0)
    cosines, sines = angles(256, 8)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(i, j):
        return (rotate(q, cosines[i], sines[i]) * rotate(k, cosines[j], sines[j])).sum()

    torch.testing.assert_close(score(query, key), score(query + shift, key + shift), rtol=0, atol=1e-11)


def test_rotation_is_the_paper_s_matrix_on_pairs_half_a_head_apart():
    torch.manual_seed(0)
    x = torch.randn(6, dtype=torch.float64)
    position = 5
    cosines, sines = angles(8, 6)
    expected = torch.empty_like(x)
    for pair in range(3):
        angle = torch.tensor(position * 10000.0 ** (-2 * pair / 6), dtype=torch.float64)
        expected[pair] = x[pair] * angle.cos() - x[pair + 3] * angle.sin()
        expected[pair + 3] = x[pair + 3] * angle.cos() + x[pair] * angle.sin()

    torch.testing.assert_close(rotate(x[None, None, None], cosines[5], sines[5]).flatten(), expected)


def test_rotation_keeps_lengths_and_leaves_position_zero():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, 8, dtype=torch.float64)
    turned = rotate(x, *angles(9, 8))

    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_rotation_is_float32_under_autocast_and_keeps_the_features_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosines, sines = rotation(torch.arange(4096.0), 8, 10000.0)
        turned = rotate(torch.ones(1, 4096, 1, 8, dtype=torch.bfloat16), cosines, sines)
    exact, _ = angles(4096, 8)

    assert cosines.dtype == sines.dtype == torch.float32
    torch.testing.assert_close(cosines.double(), exact, rtol=0, atol=1e-3)
    assert turned.dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_rmsnorm_has_unit_mean_square_and_ignores_the_scale(scale):
    torch.manual_seed(0)
    norm = make_norm(ModelSpec(width=64))
    x = torch.randn(5, 64)

    torch.testing.assert_close(norm(scale * x).pow(2).mean(dim=-1), torch.ones(5), rtol=0.02, atol=0)
    torch.testing.assert_close(norm(scale * x), norm(x), rtol=0.02, atol=1e-3)


def test_layernorm_has_zero_mean_unit_variance_and_no_bias():
    torch.manual_seed(0)
    norm = make_norm(ModelSpec(width=64, norm="layernorm"))
    y = norm(3.0 + torch.randn(5, 64))

    torch.testing.assert_close(y.mean(dim=-1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(dim=-1, correction=0), torch.ones(5), rtol=1e-3, atol=0)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


def test_qk_norm_makes_attention_ignore_the_scale_of_queries_and_keys():
    torch.manual_seed(0)
    attention = Attention(TINY.model_copy(update={"qk_norm": True})).double()
    plain = Attention(TINY).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def outputs(module):
        before = module(x, *angles(5, 4))
        with torch.no_grad():
            module.qkv.weight[:16] *= 100.0  # queries and keys, not values
        return before, module(x, *angles(5, 4))

    torch.testing.assert_close(*outputs(attention), rtol=1e-2, atol=1e-3)
    before, after = outputs(plain)
    assert (before - after).abs().max() > 1e-2


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_equal_multi_head_attention_with_repeated_keys_and_values(kv_heads):
    torch.manual_seed(0)
    spec = ModelSpec(layers=1, width=16, heads=4)
    grouped = Attention(spec.model_copy(update={"kv_heads": kv_heads})).double()
    full = Attention(spec).double()
    query, key, value = grouped.qkv.weight.split(grouped.sizes)

    def expand(weight):
        return weight.unflatten(0, (kv_heads, 4)).repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)

    full.load_state_dict(
        {"qkv.weight": torch.cat((query, expand(key), expand(value))), "output.weight": grouped.output.weight}
    )
    x = torch.randn(2, 6, 16, dtype=torch.float64)

    torch.testing.assert_close(grouped(x, *angles(6, 4)), full(x, *angles(6, 4)))


def test_attention_equals_the_softmax_written_out():
    torch.manual_seed(0)
    attention = Attention(TINY).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    cosines, sines = angles(5, 4)
    query, key, value = (part.view(1, 5, 2, 4) for part in attention.qkv(x).chunk(3, dim=-1))
    scores = torch.einsum("bihd,bjhd->bhij", rotate(query, cosines, sines), rotate(key, cosines, sines)) / 2.0
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    read = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), value).flatten(2)

    torch.testing.assert_close(attention(x, cosines, sines), attention.output(read))


def test_feed_forward_layers_equal_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    gated, plain = SwiGLU(8, 12), GELU(8, 12)
    gate, up = gated.gate_up.weight.split(12)

    torch.testing.assert_close(gated(x), (functional.silu(x @ gate.T) * (x @ up.T)) @ gated.down.weight.T)
    torch.testing.assert_close(plain(x), functional.gelu(x @ plain.up.weight.T) @ plain.down.weight.T)


@pytest.mark.parametrize(
    ("changes", "hidden"),
    [
        ({}, 704),  # round(8/3·256) = 683, up to a multiple of 64
        ({"width": 24, "heads": 2}, 64),  # exactly 64
        ({"activation": "gelu"}, 1024),
        ({"hidden": 100}, 100),
        ({"hidden": 100, "activation": "gelu"}, 100),
    ],
)
def test_hidden_features(changes, hidden):
    assert make_feed_forward(ModelSpec(**changes)).down.in_features == hidden


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "none"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "none"])
def test_block_gradients_match_finite_differences(norm, activation):
    torch.manual_seed(0)
    changes = {"norm": norm, "activation": activation, "qk_norm": True, "kv_heads": 1}
    spec = TINY.model_copy(update={**changes, "attention_temperature": "softplus"})
    block = Block(spec).double()
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(
        lambda x, *_: block(x, *angles(3, 4)), (x, *block.parameters()), fast_mode=True
    )
