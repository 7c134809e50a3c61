"""Where a decoder has its parts: alike for our transformer and for GPT-2 of the transformers library."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.models import HeadedModel, HuggingFaceModel, Transformer


@dataclass(frozen=True)
class NormPlace:
    """Where a norm of the residual stream is.

    Attributes:
        owner: The module that calls it.
        name: Its attribute there.
    """

    owner: nn.Module
    name: str

    @property
    def norm(self) -> nn.Module:
        """What is there now."""
        found: nn.Module = getattr(self.owner, self.name)
        return found

    def put(self, norm: nn.Module) -> None:
        """Put something in its place, under the same name."""
        setattr(self.owner, self.name, norm)


@dataclass(frozen=True)
class DecoderBlock:
    """A pre-norm block: what reads the residual stream behind each norm, and what is added to the stream.

    Attributes:
        attention_norm: Before the attention.
        attention_inputs: The product that makes queries, keys and values, in this order.
        values: How many of its outputs, the last, are values.
        attention_output: The product that the attention adds to the stream.
        feed_forward_norm: Before the feed-forward layer.
        feed_forward_inputs: The product behind it.
        feed_forward_output: The product that the layer adds to the stream.
    """

    attention_norm: NormPlace
    attention_inputs: nn.Module
    values: int
    attention_output: nn.Module
    feed_forward_norm: NormPlace
    feed_forward_inputs: nn.Module
    feed_forward_output: nn.Module


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder.

    Attributes:
        embeddings: Added up they begin the residual stream; the first is that of the tokens.
        blocks: In order.
        final_norm: Before the head.
    """

    embeddings: tuple[nn.Module, ...]
    blocks: tuple[DecoderBlock, ...]
    final_norm: NormPlace


def decoder_parts(model: HeadedModel, what: str) -> DecoderParts:
    """Return the parts of a decoder, before it is distributed.

    Args:
        model: Our transformer, or a GPT-2.
        what: Who asks, for messages, such as ``methods: ln-removal``.

    Raises:
        UserError: It is another model.
    """
    if isinstance(model, Transformer):
        return _of_transformer(model)
    kind = model.config.model_type if isinstance(model, HuggingFaceModel) else type(model).__name__
    require_known(kind, what)
    return _of_gpt2(model)


def require_known(kind: str, what: str) -> None:
    """Refuse models of the transformers library whose parts are not known here.

    Args:
        kind: The ``model_type`` of its configuration.
        what: Who asks.

    Raises:
        UserError: Naming the architecture.
    """
    if kind != "gpt2":
        raise UserError(
            f"{what}: knows the parts of model.source=transformer and of gpt2 (hf:PATH), not of {kind} models"
        )


def weight_by_outputs(product: nn.Module) -> Tensor:
    """Return the weight of a product as (outputs, inputs), a view; GPT-2's are the other way round."""
    weight = product.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(product).__name__} has no weight")
    return weight.T if type(product).__name__ == "Conv1D" else weight


def _of_transformer(model: Transformer) -> DecoderParts:
    blocks = tuple(
        DecoderBlock(
            NormPlace(block, "attention_norm"),
            block.attention.qkv,
            block.attention.sizes[-1],
            block.attention.output,
            NormPlace(block, "feed_forward_norm"),
            block.feed_forward.inputs,
            block.feed_forward.down,
        )
        for block in model.decoder_blocks()
    )
    return DecoderParts((model.embedding,), blocks, NormPlace(model, "final_norm"))


def _of_gpt2(model: Any) -> DecoderParts:
    inner = model.model.base_model
    blocks = tuple(
        DecoderBlock(
            NormPlace(block, "ln_1"),
            block.attn.c_attn,
            block.attn.split_size,
            block.attn.c_proj,
            NormPlace(block, "ln_2"),
            block.mlp.c_fc,
            block.mlp.c_proj,
        )
        for block in inner.h
    )
    return DecoderParts((inner.wte, inner.wpe), blocks, NormPlace(inner, "ln_f"))
