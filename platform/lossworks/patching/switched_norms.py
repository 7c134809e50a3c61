"""Norms of a decoder that can be switched to fixed divisors one by one, and folded away when all are.

Shapes: B sequences, L tokens, D features; N switches, of which the norm before an attention has two.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.models import HeadedModel, HuggingFaceModel, Transformer
from lossworks.models.huggingface import IDENTITY_GAIN
from lossworks.patching.decoder_parts import DecoderParts, NormPlace, decoder_parts, weight_by_outputs
from lossworks.specs import ModelSpec

ORDINARY, FIRST, END = 0, 1, 2
"""Kinds of tokens with running means of their own: most, first ones of sequences, and ends of texts."""


class Switchboard:
    """Which paths divide by a fixed number, and by which.

    Args:
        count: N.
        special: Whether first tokens and those that end texts have divisors of their own, to begin with.

    Attributes:
        off: int64 (N + 2,): whether a path divides by a fixed number; at N + 1 and N + 2 whether the tokens
            that end texts, and the first ones, are divided by the common one.
        means: float64 (N, 3): running mean of a path's deviations by kind of token, which stays as it is once
            the path is off; 0 where no token of the kind was seen.
        end: The token that ends texts; None if there is none.
    """

    def __init__(self, count: int, *, special: bool) -> None:
        self.off = torch.zeros(count + 2, dtype=torch.int64)
        self.off[count:] = int(not special)
        self.means = torch.zeros(count, 3, dtype=torch.float64)
        self.end: int | None = None
        self._kinds = torch.zeros(1, 1, dtype=torch.int64)

    def see(self, tokens: Tensor) -> None:
        """Look at the tokens (B, L) int64 that a forward pass begins with."""
        self._kinds = torch.zeros_like(tokens)
        if self.end is not None:
            self._kinds[tokens == self.end] = END
        self._kinds[:, 0] = FIRST

    @property
    def kinds(self) -> Tensor:
        """Kinds of the tokens at hand, (B, L) int64."""
        return self._kinds

    def divisor(self, path: int, like: Tensor) -> Tensor | None:
        """Return by what a path divides, to be broadcast over (B, L, 1); None as long as its norm is real."""
        if not self.off[path]:
            return None
        common, *own = self.means[path].tolist()
        merged = self.off[-2:].flip(0).tolist()  # of the first tokens, of those that end texts
        table = [common] + [
            common if off or not mean else mean for off, mean in zip(merged, own, strict=True)
        ]
        if len(set(table)) == 1:
            return like.new_tensor(common)
        return like.new_tensor(table)[self._kinds][..., None]


class SwitchedNorm(nn.Module):
    """A norm, of which a path is real, or divides by a fixed number instead of the token's own deviation.

    A real path is the very norm that was there. One that is off gives (x − mean(x))/σ̄·γ + β, and for RMSNorm
    x/σ̄·γ. Its parameters have the names of the norm's own.

    Args:
        norm: A LayerNorm or RMSNorm.
        board: Says which paths are off.
        paths: Their places on the board; two for the norm before an attention, the second for the values.

    Attributes:
        deviations: Of the tokens of the last forward pass in training, (B, L): √(var + ε), or the root mean
            square; with a gradient if ``watched``.
        watched: Whether the deviations keep their gradient.
        second: What the second path gives, where it is not what the first one gives.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, norm: nn.Module, board: Switchboard, paths: Sequence[int]) -> None:
        super().__init__()
        own = cast("nn.LayerNorm | nn.RMSNorm", norm)
        self.centred = isinstance(norm, nn.LayerNorm)
        self.weight = own.weight
        self.register_parameter("bias", getattr(own, "bias", None))
        self.epsilon = float(own.eps or 0.0)
        self.board, self.paths = board, tuple(paths)
        self.watched = False
        self.deviations: Tensor | None = None
        self.second: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return what the first path gives for x (B, L, D), in its shape."""
        real = not all(self.board.off[path] for path in self.paths)
        if (real or self.watched) and self.training and torch.is_grad_enabled():
            with torch.set_grad_enabled(self.watched):
                self.deviations = self.deviation(x)
        divisors = [self.board.divisor(path, x) for path in self.paths]
        found = [self._divided(x, divisor) for divisor in _distinct(divisors)]
        self.second = found[1] if len(found) > 1 else None
        return found[0]

    def deviation(self, x: Tensor) -> Tensor:
        """Return √(var + ε) of each token, (B, L) float32 at least; for RMSNorm the root mean square."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        square = wide.var(-1, correction=0) if self.centred else wide.square().mean(-1)
        return (square + self.epsilon).sqrt()

    def _divided(self, x: Tensor, divisor: Tensor | None) -> Tensor:
        shape = (x.shape[-1],)
        if divisor is None and self.centred:
            return functional.layer_norm(x, shape, self.weight, self.bias, self.epsilon)
        if divisor is None:
            return functional.rms_norm(x, shape, self.weight, self.epsilon)
        centred = x - x.mean(-1, keepdim=True) if self.centred else x
        found = centred / divisor * self.weight
        return found if self.bias is None else found + self.bias


def _distinct(divisors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the divisors of a norm's paths, one where all are the same."""
    first = divisors[0]
    same = all(
        other is None if first is None else other is not None and torch.equal(first, other)
        for other in divisors[1:]
    )
    return [first] if same else list(divisors)


class SwitchedNorms:
    """A decoder's norms with switches, in the order in which they are to go.

    The order is that of the paper: norms before feed-forward layers from below, then those before attentions
    for queries and keys, then for values, then the final one.

    Args:
        model: Ours or a GPT-2, before it is distributed; its norms are replaced.
        what: Who asks, for messages.
        special: See :class:`Switchboard`.

    Raises:
        UserError: It is another model.
    """

    def __init__(self, model: HeadedModel, what: str, *, special: bool) -> None:
        parts = decoder_parts(model, what)
        self.layers = len(parts.blocks)
        self.board = Switchboard(3 * self.layers + 1, special=special)
        self.norms = [self._switched(place, paths) for place, paths in switch_places(parts)]
        self.final = self.norms[-1]
        self.final.watched = True
        for block in parts.blocks:
            norm = cast("SwitchedNorm", block.attention_norm.norm)
            block.attention_inputs.register_forward_hook(_valued(norm, block.values))
        parts.embeddings[0].register_forward_pre_hook(lambda _, inputs: self.board.see(inputs[0]))

    def _switched(self, place: NormPlace, paths: Sequence[int]) -> SwitchedNorm:
        norm = SwitchedNorm(place.norm, self.board, paths)
        place.put(norm)
        return norm


def switch_places(parts: DecoderParts) -> list[tuple[NormPlace, tuple[int, ...]]]:
    """Return every norm with the places of its paths on a :class:`Switchboard`, the final norm last."""
    layers = len(parts.blocks)
    found: list[tuple[NormPlace, tuple[int, ...]]] = []
    for layer, block in enumerate(parts.blocks):
        found.append((block.feed_forward_norm, (layer,)))
        found.append((block.attention_norm, (layers + layer, 2 * layers + layer)))
    return [*found, (parts.final_norm, (3 * layers,))]


def _valued(norm: SwitchedNorm, values: int) -> Any:
    """Return a hook on a product of queries, keys and values that gives the values their own path."""

    def hook(product: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        second, norm.second = norm.second, None
        if second is None:
            return None
        # Called by its forward, which calls no hook.
        return torch.cat((output[..., :-values], product.forward(second)[..., -values:]), -1)

    return hook


@torch.no_grad()
def folded(model: HeadedModel, spec: ModelSpec, means: Tensor) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Return the description and tensors of a model without norms that equals one whose norms are all off.

    Where norms centre, the matrices that write the residual stream do; γ/σ̄ and β go into those that read it,
    so the head is one of its own even if it was the embedding. A GPT-2 of the transformers library has norms
    whatever its configuration says: they are left as what takes nothing away, 2²⁰ over √(2⁴⁰ + var), and its
    final one as γ/σ̄ and β, since a head has no place for β. In float16 it would not be finite.

    Args:
        model: With real norms, on the CPU; it is changed.
        spec: What it was built from.
        means: float64 (N, 3), as :class:`Switchboard` has them; the common ones count.

    Raises:
        UserError: Its parts are not known.
    """
    parts = decoder_parts(model, "a model whose norms were removed")
    centred = isinstance(parts.final_norm.norm, nn.LayerNorm)
    common = means[:, ORDINARY]
    layers = len(parts.blocks)
    for layer, block in enumerate(parts.blocks):
        rows = weight_by_outputs(block.attention_inputs).shape[0] - block.values
        scales = torch.full((rows + block.values, 1), float(common[layers + layer]), dtype=torch.float64)
        scales[rows:] = common[2 * layers + layer]
        _read(block.attention_inputs, block.attention_norm.norm, scales)
        _read(block.feed_forward_inputs, block.feed_forward_norm.norm, common[layer])
        if centred:
            _centre(block.attention_output)
            _centre(block.feed_forward_output)
    classes, features = model.head().weight.shape
    own_head = nn.Linear(features, classes, bias=False)
    own_head.weight.copy_(model.head().weight)
    if centred:
        for embedding in parts.embeddings:
            table = cast("Tensor", embedding.weight)
            table.copy_(table.double() - table.double().mean(1, keepdim=True))
    if isinstance(model, Transformer):
        _read(own_head, parts.final_norm.norm, common[-1])
        model.lm_head = own_head
        for place, _ in switch_places(parts):
            place.put(nn.Identity())
        return spec.model_copy(update={"norm": "none", "tied": False}), model.state_dict()
    stock: Any = cast("HuggingFaceModel", model).model
    stock.set_output_embeddings(own_head)
    for place, _ in switch_places(parts)[:-1]:
        cast("Tensor", place.norm.weight).fill_(IDENTITY_GAIN)
        cast("Tensor", place.norm.bias).zero_()
    final = cast("Tensor", parts.final_norm.norm.weight)
    final.copy_(final.double() * IDENTITY_GAIN / common[-1])
    return spec.model_copy(update={"norm": "none"}), model.state_dict()


def _read(product: nn.Module, norm: nn.Module, divisor: Tensor) -> None:
    """Let a product take what a norm took, scaled, without the norm: W·diag(γ)/σ̄, and W·β in its bias."""
    weight = weight_by_outputs(product)
    wide, bias = weight.double(), getattr(norm, "bias", None)
    if bias is not None:
        own = cast("Tensor", product.bias)
        own.copy_(own.double() + wide @ cast("Tensor", bias).double())
    weight.copy_(wide * cast("Tensor", norm.weight).double() / divisor)


def _centre(product: nn.Module) -> None:
    """Let a product write nothing into the mean of the residual stream's features."""
    weight, bias = weight_by_outputs(product), getattr(product, "bias", None)
    weight.copy_(weight.double() - weight.double().mean(0, keepdim=True))
    if isinstance(bias, Tensor):
        bias.copy_(bias.double() - bias.double().mean())
