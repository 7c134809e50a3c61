"""The parts of a transformer block.

Shapes: B sequences, L tokens, D features, H query heads, K key-value heads, d = D/H features a head.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lossworks.specs import ModelSpec

RMS_EPSILON = 1e-6


def rotation(positions: Tensor, features: int, base: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of rotary position embeddings.

    Pair i of a head's features turns by the angle position · base^(−2i/d).

    Args:
        positions: (…, L), in the precision of the angles; half precision can't tell positions beyond a few
            hundred apart.
        features: d, even.
        base: θ of the paper, 10000 there.

    Returns:
        Two tensors (…, L, 1, d/2), to be broadcast over the heads.

    References:
        Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", equation 15.
    """
    exponents = torch.arange(0, features, 2, device=positions.device, dtype=positions.dtype) / features
    angles = (positions[..., None] * base**-exponents)[..., None, :]
    return angles.cos(), angles.sin()


def isolation(tokens: Tensor, separator: int) -> Tensor:
    """Return which tokens see which where documents don't see each other.

    A document begins with the separator that ended the one before, so that its first token is predicted from
    the separator alone. Rotary positions need not begin anew: attention depends on their differences only.

    Args:
        tokens: (B, L) int64.
        separator: The token that ends documents.

    Returns:
        bool (B, 1, L, L), to be broadcast over the heads: whether the token of the third axis sees the token
        of the fourth, which is in the same document and not after it.
    """
    documents = (tokens == separator).cumsum(1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same.tril()


def rotate(features: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return ``features`` (B, L, H, d) turned by the angles of ``rotation``, in their own dtype.

    Feature i is paired with i + d/2, not with its neighbour as in the paper: the same up to a fixed order of
    the features, and both halves stay contiguous.
    """
    first, second = features.chunk(2, dim=-1)
    # Under autocast the features are bfloat16 and the angles float32: the products promote to float32.
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(features.dtype)


def make_norm(spec: ModelSpec) -> nn.Module:
    """Return the norm of the residual stream, (..., D) to (..., D), with a gain and without a bias, or none.

    References:
        Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4.
        Ba et al. 2016, "Layer Normalization".
    """
    if spec.norm == "none":
        return nn.Identity()
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(spec.width, eps=RMS_EPSILON)
    return nn.LayerNorm(spec.width, bias=False)


class KeyValues:
    """Keys and values of what a layer's attention has read, of B rows; there is room for so many tokens.

    Args:
        length: Tokens of a row at most.
    """

    def __init__(self, length: int) -> None:
        self._length, self._filled = length, 0
        self._kept: Tensor | None = None  # (2, B, length, K, d)

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of T tokens, (B, T, K, d), and return those of all, (B, S, K, d)."""
        if self._kept is None:
            self._kept = key.new_empty(2, len(key), self._length, *key.shape[2:])
        start, self._filled = self._filled, self._filled + key.shape[1]
        self._kept[0, :, start : self._filled] = key
        self._kept[1, :, start : self._filled] = value
        keys, values = self._kept[:, :, : self._filled]
        return keys, values

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but those at the places (R,) int64."""
        self._kept = None if self._kept is None else self._kept[:, rows]


class Temperatures(nn.Module):
    """Positive numbers that are learnt, one for each head and position, by which scores are divided.

    References:
        Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs", section 4; there is no say in it how
        they are kept positive.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self._spec = spec
        # One axis, since they are no matrix: nothing decays or orthogonalises them.
        self.raw = nn.Parameter(torch.empty(spec.heads * spec.temperature_positions))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all to what the spec says."""
        start = self._spec.temperature_init
        exp = self._spec.attention_temperature == "exp"
        # The inverse of softplus, in a form that does not overflow.
        self.raw.fill_(math.log(start) if exp else start + math.log(-math.expm1(-start)))

    def forward(self, places: Tensor) -> Tensor:
        """Return the temperatures (…, L, H, 1) at positions (…, L) int64, to be broadcast over a head."""
        spec = self._spec
        raw = self.raw.unflatten(0, (spec.heads, spec.temperature_positions)).t()
        chosen = raw[places.clamp(max=spec.temperature_positions - 1)][..., None]
        return chosen.exp() if spec.attention_temperature == "exp" else functional.softplus(chosen)


class Attention(nn.Module):
    """Causal self-attention with rotary positions, grouped key-value heads and optional qk-norm.

    References:
        Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models".
        Henry et al. 2020, "Query-Key Normalization for Transformers", and Dehghani et al. 2023, "Scaling
        Vision Transformers to 22 Billion Parameters": here RMSNorm with a gain for each feature of a head.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_features = spec.width // spec.heads
        self.kv_heads = spec.kv_heads or spec.heads
        # One product for queries, keys and values: fewer and larger ones are faster.
        self.sizes = [spec.width, self.kv_heads * self.head_features, self.kv_heads * self.head_features]
        self.qkv = nn.Linear(spec.width, sum(self.sizes), bias=False)
        self.output = nn.Linear(spec.width, spec.width, bias=False)
        self.query_norm = nn.RMSNorm(self.head_features, eps=RMS_EPSILON) if spec.qk_norm else None
        self.key_norm = nn.RMSNorm(self.head_features, eps=RMS_EPSILON) if spec.qk_norm else None
        self.temperatures = None if spec.attention_temperature == "none" else Temperatures(spec)

    def forward(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        seen: Tensor | None = None,
        memory: KeyValues | None = None,
        *,
        places: Tensor | None = None,
        observed: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what the tokens (B, L, D) read from those before them and themselves.

        Args:
            x: (B, L, D).
            cosines: As :func:`rotation` gives them.
            sines: The same.
            seen: As :func:`isolation` gives it; None where every token sees all before it.
            memory: What was read before, which these tokens read, too, and are added to; ``seen`` then says
                of all S tokens which are seen, (B, 1, L, S).
            places: Positions (L) or (B, L) int64 within the document, by which temperatures are chosen; they
                count from 0 if None.
            observed: Whether the entropies are wanted, for which the scores are formed beside the fused pass.

        Returns:
            (B, L, D); if observed, with the entropies (B, H, L) of what each token reads, in nats.
        """
        parts = self.qkv(x).split(self.sizes, dim=-1)
        query, key, value = (part.unflatten(-1, (-1, self.head_features)) for part in parts)
        query = rotate(_norm(self.query_norm, query), cosines, sines)
        if self.temperatures is not None:
            places = torch.arange(x.shape[1], device=x.device) if places is None else places
            query = (query / self.temperatures(places)).to(query.dtype)
        key = rotate(_norm(self.key_norm, key), cosines, sines)
        if memory is not None:
            key, value = memory.extended(key, value)
        read = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=seen,
            is_causal=seen is None,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        found: Tensor = self.output(read.transpose(1, 2).flatten(2))
        return (found, _score_entropies(query, key, seen)) if observed else found


def _score_entropies(query: Tensor, key: Tensor, seen: Tensor | None) -> Tensor:
    """Return the entropies (B, H, L) of the attention of queries (B, L, H, d) to keys (B, L, K, d), in nats.

    It is written on log-probabilities, so that a probability of 0 gives no gradient of ∞·0.
    """
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / math.sqrt(query.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    log_p = scores.masked_fill(~seen, -torch.inf).log_softmax(dim=-1)
    return -(log_p.exp() * log_p.masked_fill(~seen, 0.0)).sum(dim=-1)


def _norm(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    """Return ``norm(x)`` in the dtype of ``x``, computed in that of the gain: float32 under autocast."""
    return x if norm is None else norm(x.to(norm.weight.dtype)).to(x.dtype)


class SwiGLU(nn.Module):
    """The gated feed-forward layer (silu(x·G) ⊙ x·U)·W.

    References:
        Shazeer 2020, "GLU Variants Improve Transformer", equation 6.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    @property
    def inputs(self) -> nn.Linear:
        """The product that reads the layer's input."""
        return self.gate_up

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's values (B, L, D) for ``x`` (B, L, D)."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        found: Tensor = self.down(functional.silu(gate) * up)
        return found


class GELU(nn.Module):
    """The feed-forward layer gelu(x·U)·W, with the exact Gaussian error function.

    References:
        Hendrycks and Gimpel 2016, "Gaussian Error Linear Units".
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    @property
    def inputs(self) -> nn.Linear:
        """The product that reads the layer's input."""
        return self.up

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's values (B, L, D) for ``x`` (B, L, D)."""
        found: Tensor = self.down(functional.gelu(self.up(x)))
        return found


class MergedLinear(nn.Module):
    """The feed-forward layer x·W without an activation, for which one matrix D × D is enough."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width, bias=False)

    @property
    def inputs(self) -> nn.Linear:
        """The matrix that reads the layer's input: the only one."""
        return self.down

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's values (B, L, D) for ``x`` (B, L, D)."""
        found: Tensor = self.down(x)
        return found


def make_feed_forward(spec: ModelSpec) -> SwiGLU | GELU | MergedLinear:
    """Return the feed-forward layer with ``spec.hidden`` features, or as many as is usual for its kind.

    A SwiGLU has three matrices where GELU has two, so 8/3·D features match the 4·D of GELU in parameters;
    they are rounded up to a multiple of 64, which products like.
    """
    if spec.activation == "none":
        return MergedLinear(spec.width)
    if spec.activation == "gelu":
        return GELU(spec.width, spec.hidden or 4 * spec.width)
    return SwiGLU(spec.width, spec.hidden or 64 * math.ceil(round(8 * spec.width / 3) / 64))


class Block(nn.Module):
    """A pre-norm transformer block: attention, then a feed-forward layer, each added to its input.

    A linear feed-forward layer is added at a scale, x_out = β·x + (1/α)·FFN(x), with α and β learnt.

    References:
        Jha and Reagen 2025, "Entropy-Guided Attention for Private LLMs", for the linear layer and its scales.

    Attributes:
        scales: α and β, (2,), of a linear feed-forward layer; None of others.
        checkpointed: Whether the backward pass computes the activations again. The switch is inside the
            block, so that FSDP's gathering and ``compile`` stay outside of what is recomputed.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.feed_forward_norm = make_norm(spec)
        self.feed_forward = make_feed_forward(spec)
        self.scales = nn.Parameter(torch.ones(2)) if spec.activation == "none" else None
        self.checkpointed = False

    def forward(
        self,
        x: Tensor,
        cosines: Tensor,
        sines: Tensor,
        seen: Tensor | None = None,
        memory: KeyValues | None = None,
        *,
        places: Tensor | None = None,
        observed: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the residual stream (B, L, D) after this block; arguments and more as :class:`Attention`."""
        further: dict[str, Any] = {"memory": memory, "places": places, "observed": observed}
        if self.checkpointed and torch.is_grad_enabled():
            # The block draws no random numbers, so there is no generator state to keep.
            how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            found: Tensor = checkpoint(self._apply_layers, x, cosines, sines, seen, **further, **how)
            return found
        return self._apply_layers(x, cosines, sines, seen, **further)

    def _apply_layers(
        self, x: Tensor, cosines: Tensor, sines: Tensor, seen: Tensor | None, **further: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        read = self.attention(self.attention_norm(x), cosines, sines, seen, **further)
        read, entropies = read if further["observed"] else (read, None)
        x = x + read
        added = self.feed_forward(self.feed_forward_norm(x))
        if self.scales is None:
            found: Tensor = x + added
        else:
            alpha, beta = self.scales
            found = beta * x + added / alpha
        return found if entropies is None else (found, entropies)

    def residual_projections(self) -> list[nn.Linear]:
        """Return the layers whose values are added to the residual stream."""
        return [self.attention.output, self.feed_forward.down]
