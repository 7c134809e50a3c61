"""Our own decoder-only transformer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lossworks.models.interface import Head, LanguageModel
from lossworks.models.layers import Block, KeyValues, Temperatures, isolation, make_norm, rotation
from lossworks.specs import ModelSpec

INIT_STD = 0.02
_FILLING = -1  # the document of what fills a row in front


class Transformer(LanguageModel):
    """A decoder-only, pre-norm transformer with rotary positions and no biases.

    It has no buffers: the rotary angles are computed once a forward pass, for the length at hand. So there is
    no limit to the length, and nothing that sharding, replicas or a checkpoint would have to carry. Under
    FSDP with a ``MixedPrecisionPolicy``, set ``cast_forward_inputs=False``: it would round the angles that
    the blocks are given.

    Args:
        spec: Shape; ``spec.source`` is ``transformer``.
        vocab_size: V.
        generator: Source of the initial parameters; the global one if None.

    Attributes:
        separator: The token that ends documents, where they don't see each other; None where they do.
    """

    def __init__(self, spec: ModelSpec, *, vocab_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.separator: int | None = None
        self.embedding = nn.Embedding(vocab_size, spec.width)
        self.layers = nn.ModuleList(Block(spec) for _ in range(spec.layers))
        self.final_norm = make_norm(spec)
        self.lm_head = None if spec.tied else nn.Linear(spec.width, vocab_size, bias=False)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all matrices anew from N(0, 0.02²), and set all gains to one.

        The layers that add to the residual stream are drawn 1/√(2·layers) smaller, because there are
        2·layers of them and the variance of the stream would grow with their number.

        References:
            Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.3.
        """
        residual = {
            projection for block in self.decoder_blocks() for projection in block.residual_projections()
        }
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                scale = 1.0 / math.sqrt(2 * self.spec.layers) if module in residual else 1.0
                nn.init.normal_(module.weight, std=INIT_STD * scale, generator=generator)
            elif isinstance(module, nn.RMSNorm | nn.LayerNorm | Temperatures):
                module.reset_parameters()
            elif isinstance(module, Block) and module.scales is not None:
                module.scales.fill_(1.0)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the features (B, L, D), after the final norm, of ``tokens`` (B, L) int64."""
        return self._read_documents(tokens)

    def observed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`LanguageModel.observed`."""
        entropies: list[Tensor] = []
        hidden = self._read_documents(tokens, entropies)
        return hidden, torch.stack(entropies, dim=1)

    def attention_shape(self) -> tuple[int, int]:
        """Return ``spec.layers`` and ``spec.heads``."""
        return self.spec.layers, self.spec.heads

    def _read_documents(self, tokens: Tensor, entropies: list[Tensor] | None = None) -> Tensor:
        positions = places = torch.arange(tokens.shape[1], device=tokens.device)
        if self.separator is None:
            return self._read(tokens, positions, places, None, entropies=entropies)
        places = positions - _begins(positions.where(tokens == self.separator, 0))
        seen = isolation(tokens, self.separator)
        return self._read(tokens, positions, places, seen, entropies=entropies)

    def _read(
        self,
        tokens: Tensor,
        positions: Tensor,
        places: Tensor,
        seen: Tensor | None,
        memories: Sequence[KeyValues | None] | None = None,
        entropies: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the features (B, L, D) of tokens at positions, and at places in documents, (L) or (B, L).

        The entropies (B, H, L) of each layer's attention are put into a list, if one is given.
        """
        x = self.embedding(tokens)
        spec = self.spec
        precise = positions.to(torch.promote_types(torch.float32, x.dtype))
        cosines, sines = rotation(precise, spec.width // spec.heads, spec.rope_base)
        for layer, memory in zip(self.layers, memories or [None] * len(self.layers), strict=True):
            if entropies is None:
                x = layer(x, cosines, sines, seen, memory, places=places)
            else:
                x, found = layer(x, cosines, sines, seen, memory, places=places, observed=True)
                entropies.append(found)
        hidden: Tensor = self.final_norm(x)
        return hidden

    def reader(self, rows: int, length: int) -> "TransformerReader":
        """See :meth:`LanguageModel.reader`; there is no limit to the positions."""
        return TransformerReader(self, rows, length)

    def head(self) -> Head:
        """Return the head, which has neither bias nor softcap."""
        return Head(self.embedding.weight if self.lm_head is None else self.lm_head.weight)

    def blocks(self) -> list[nn.Module]:
        """Return the transformer blocks in order."""
        return list(self.layers)

    def checkpoint_activations(self) -> None:
        """Keep only the blocks' inputs from now on, and compute the rest again in the backward pass."""
        for block in self.decoder_blocks():
            block.checkpointed = True

    def isolate(self, separator: int) -> None:
        """See :meth:`LanguageModel.isolate`."""
        self.separator = separator

    def depth_and_width(self) -> tuple[int, int]:
        """Return ``spec.layers`` and ``spec.width``."""
        return self.spec.layers, self.spec.width

    def decoder_blocks(self) -> list[Block]:
        """Return the blocks under their own type, which ``ModuleList`` doesn't keep."""
        return [layer for layer in self.layers if isinstance(layer, Block)]


class TransformerReader:
    """A transformer that reads rows piece by piece; see :class:`lossworks.models.generation.decoding.Reader`.

    Every row counts its own positions and documents, whatever fills it in front.

    Args:
        model: In eval mode.
        rows: B.
        length: Tokens of a row at most, filling included.
    """

    def __init__(self, model: Transformer, rows: int, length: int) -> None:
        device = model.embedding.weight.device
        self._model = model
        self._memories = [KeyValues(length) for _ in model.layers]
        self._filled = 0
        self._next = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # position of the next token
        self._begin = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # its document's position
        self._document = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # of the last token
        self._documents = torch.full((rows, length), _FILLING, device=device)  # of every token

    def read(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """See :meth:`lossworks.models.generation.decoding.Reader.read`."""
        model, end = self._model, self._filled + tokens.shape[1]
        positions = (self._next + valid.cumsum(1) - 1).clamp(min=0)
        begins, documents = self._begin.expand(tokens.shape), self._document.expand(tokens.shape)
        if model.separator is not None:
            ends = (tokens == model.separator) & valid
            begins = _begins(positions.where(ends, begins))
            documents = documents + ends.cumsum(1)
        self._documents[:, self._filled : end] = documents.where(valid, _FILLING)
        own = torch.arange(self._filled, end, device=tokens.device)[:, None]
        keys = torch.arange(end, device=tokens.device)
        same = self._documents[:, None, :end] == documents[:, :, None]
        # Filling sees itself, since a softmax over nothing is NaN.
        seen = (same & (keys < own)) | (keys == own)
        features = model._read(tokens, positions, positions - begins, seen[:, None], self._memories)
        self._next, self._begin, self._document = positions[:, -1:] + 1, begins[:, -1:], documents[:, -1:]
        self._filled = end
        return features[:, -1]

    def keep(self, rows: Tensor) -> None:
        """See :meth:`lossworks.models.generation.decoding.Reader.keep`."""
        for memory in self._memories:
            memory.keep(rows)
        self._next, self._begin = self._next[rows], self._begin[rows]
        self._document, self._documents = self._document[rows], self._documents[rows]


def _begins(marked: Tensor) -> Tensor:
    """Return where each token's document begins, (B, L), from the positions of first tokens, 0 elsewhere."""
    return marked.cummax(dim=-1).values
