"""What the training code asks of a model.

Shapes in this package: B sequences, L tokens a sequence, D features a token (the width), V entries of the
vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.errors import UserError
from lossworks.models.generation.decoding import Ended, Reader, decode, require_prompts
from lossworks.models.generation.sampling import DrawSeed, Sampling


@dataclass(frozen=True, eq=False)  # tensors have no equality that gives one bool
class Head:
    """The linear map from features to logits, for losses that never build the logits.

    Attributes:
        weight: (V, D) floats; a DTensor if its classes are spread over ranks.
        bias: (V) floats, or None; spread like the weight.
        softcap: Bound c of the logits z, which become c·tanh(z/c) as in Gemma 2; None for no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the dense logits (..., V) of the features ``hidden`` (..., D).

        Where the classes are spread over ranks they are gathered, so every rank must call; what comes back is
        for generation, since its gradient with respect to the head would be one rank's only.
        """
        bias = None if self.bias is None else _whole(self.bias)
        logits = functional.linear(hidden, _whole(self.weight), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor with what other ranks hold of it."""
    # Asked for by name, since importing DTensor costs time that a model on its own need not spend.
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class Outputs:
    """What a model gives for a batch: features and head, and logits only when they are asked for.

    Args:
        hidden: Features, shape (…, D).
        head: The head; None for stacks of models, whose logits are there.
        dense: The logits (…, K), where they are there already.
        rerun: From other inputs to their outputs, for losses that look at changed inputs.
        roles: Outputs of companions of the model, such as a teacher, by role.
        attention: Gives the entropies of the model's attention; None of models that have none.
        sides: Further outputs for the same targets, such as coarser maps of a segmenter.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head | None,
        *,
        dense: Tensor | None = None,
        rerun: "Callable[[Tensor], Outputs] | None" = None,
        roles: "Mapping[str, Outputs] | None" = None,
        attention: Callable[[], Tensor] | None = None,
        sides: "Sequence[Outputs]" = (),
    ) -> None:
        self.hidden, self.head, self.sides = hidden, head, tuple(sides)
        self.rerun, self.roles, self.attention = rerun, dict(roles or {}), attention
        self._dense = dense

    @property
    def logits(self) -> Tensor:
        """The logits (…, K); they are built at the first call."""
        if self._dense is None:
            if self.head is None:
                raise ValueError("outputs without a head must hold their logits")
            self._dense = self.head.logits(self.hidden)
        return self._dense

    @property
    def attention_entropies(self) -> Tensor:
        """The entropies of the model's attention, in nats, (B, …, M, H, L): of what each of L tokens reads.

        M are the layers, H the heads. Tokens that are not seen have no part in them. They take a pass of
        their own through a model that was not told before (:meth:`LanguageModel.observe_attention`).

        Raises:
            UserError: The model has no attention, or doesn't say what it reads.
        """
        if self.attention is None:
            raise UserError("these outputs are not of a language model, or without its attention")
        return self.attention()

    def at(self, index: Any) -> "Outputs":
        """Return those at an index into the leading axes, such as one of several answers to each prompt.

        Args:
            index: As of a tensor; it leaves the last axis alone.
        """
        dense = None if self._dense is None else self._dense[index]
        return Outputs(self.hidden[index], self.head, dense=dense)

    def with_roles(self, roles: "Mapping[str, Outputs]") -> "Outputs":
        """Return the same with the outputs of companions."""
        return Outputs(
            self.hidden,
            self.head,
            dense=self._dense,
            rerun=self.rerun,
            roles=roles,
            attention=self.attention,
            sides=self.sides,
        )


ModelObjective = Callable[[Outputs, Mapping[str, Tensor]], Tensor]
"""Called with what the model gives and the batch; returns whatever is to leave the model's forward."""


class HeadedModel(nn.Module, ABC):
    """A model that gives out its features and its head instead of its logits."""

    @abstractmethod
    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the features (B, …, D) that the head is applied to, for a batch of B inputs."""

    @abstractmethod
    def head(self) -> Head:
        """Return the head; its weight is the embedding matrix itself where the two are tied."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order: the units of sharding and compilation."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Keep only the blocks' inputs from now on, and compute the rest again in the backward pass.

        Raises:
            UserError: The architecture can't do it.
        """

    def attach(self, name: str, module: nn.Module) -> None:
        """Make a module part of what is trained, sharded and kept in checkpoints, such as a loss.

        Its parameters and state carry the name; a module without any leaves the model's state as it was.
        """
        self.add_module(name, module)

    def outputs(self, inputs: Tensor) -> Outputs:
        """Return features and head for inputs that ``hidden`` takes."""
        return Outputs(self.hidden(inputs), self.head(), rerun=self.outputs)

    def forward(self, batch: Mapping[str, Tensor], objective: ModelObjective) -> Tensor:
        """Return ``objective(outputs, batch)``.

        The objective runs in here, and not after the model, because FSDP gathers the sharded head only
        while ``forward`` runs; DDP, too, sees only what ``forward`` does.

        Args:
            batch: ``inputs``, which ``hidden`` takes, and whatever else the objective takes.
            objective: Any loss; the model knows none.
        """
        return objective(self.outputs(batch["inputs"]), batch)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the dense logits (B, …, V) of inputs, for prediction and tests.

        FSDP gathers parameters for ``forward`` alone; a sharded model needs
        ``register_fsdp_forward_method(model, "logits")`` first.
        """
        return self.head().logits(self.hidden(inputs))


class LanguageModel(HeadedModel):
    """A causal language model; its inputs are tokens (B, L) int64, its features (B, L, D), after the norm.

    ``outputs`` takes more axes before L, too, such as several answers to each of B prompts.
    """

    observing = False
    """Whether each pass gives the entropies of its attention, too."""

    def outputs(self, inputs: Tensor) -> Outputs:
        """See :meth:`HeadedModel.outputs`; inputs are (B, …, L), features (B, …, L, D)."""
        tokens, axes = inputs.flatten(0, -2), inputs.shape[:-1]
        if self.observing:
            hidden, entropies = self.observed(tokens)
        else:
            hidden, entropies = self.hidden(tokens), None

        def attention() -> Tensor:
            found: Tensor = self.observed(tokens)[1] if entropies is None else entropies
            apart: Tensor = found.unflatten(0, axes)
            return apart

        return Outputs(hidden.unflatten(0, axes), self.head(), rerun=self.outputs, attention=attention)

    def observe_attention(self) -> None:
        """Have each pass give the entropies of its attention from now on, for whoever asks its outputs.

        Features and gradients stay as they are.

        Raises:
            UserError: The model can't do it.
        """
        self.attention_shape()
        self.observing = True

    def attention_shape(self) -> tuple[int, int]:
        """Return the numbers of layers M and of heads H.

        Raises:
            UserError: They aren't known.
        """
        raise UserError(f"{type(self).__name__}: doesn't say how many heads of attention it has")

    def observed(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (B, L, D) of tokens (B, L), and entropies of attention (B, M, H, L) in nats.

        Raises:
            UserError: The model can't do it.
        """
        del tokens
        raise UserError(f"{type(self).__name__}: doesn't say what its attention reads")

    def isolate(self, separator: int) -> None:
        """Have no token see a document before its own from now on.

        A document begins with the token that ended the one before.

        Args:
            separator: The token that ends documents.

        Raises:
            UserError: The model can't do it.
        """
        del separator
        raise UserError(
            "data.isolate=true: needs model.source=transformer; models of transformers (hf:PATH) can't do it"
        )

    @abstractmethod
    def depth_and_width(self) -> tuple[int, int] | None:
        """Return the number of attention layers and their features D, or None if they aren't known."""

    @abstractmethod
    def reader(self, rows: int, length: int) -> Reader:
        """Return what reads rows piece by piece, and keeps keys and values of what it has read.

        Args:
            rows: B.
            length: Tokens that a row will have at most, filling included.

        Raises:
            UserError: The architecture can't do it, or its positions don't reach so far.
        """

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seeds: Sequence[DrawSeed] | None = None,
        ended: Ended | None = None,
    ) -> list[list[int]]:
        """Return the tokens that the model writes behind each prompt; the prompts are not among them.

        Keys and values are kept between tokens, so that each costs a pass of one token. Prompts of unequal
        length go together: every row gets what it would get alone, but for the rounding of products of
        another shape.

        Args:
            prompts: Tokens of each row, at least one.
            new_tokens: How many to add at most.
            temperature: Divides the logits; 0 takes the most likely token.
            top_p: See :class:`lossworks.models.generation.sampling.Sampling`.
            seeds: Of each row's draws, which depend on nothing else; the row's number if None.
            ended: Called with a row's number and its new tokens after each; a row ends where it says so.

        Raises:
            UserError: A number is out of its range, a prompt is empty, or the model can't read so far.
            RunError: The model's logits are not finite.
        """
        require_prompts(prompts, new_tokens)
        sampling = Sampling(temperature, top_p)
        if not prompts or not new_tokens:
            return [[] for _ in prompts]
        training = self.training
        self.eval()
        try:
            return decode(
                self.reader(len(prompts), max(map(len, prompts)) + new_tokens),
                self.head().logits,
                prompts,
                new_tokens,
                sampling=sampling,
                seeds=seeds,
                ended=ended,
                device=next(self.parameters()).device,
            )
        finally:
            self.train(training)

    def flops_per_token(self, sequence_length: int) -> float | None:
        """Return the floating-point operations of one training step per token, or None if not known.

        The convention is that of PaLM (Chowdhery et al. 2022, appendix B): 6 a matrix parameter (2 forward,
        4 backward) and 12·layers·D·L for attention scores and values, of which a causal mask could save half.
        The head's product counts, even where it is tied; embedding look-ups, norms and recomputed activations
        don't. Of a mixture of experts every expert counts, so the number is too high there.

        Args:
            sequence_length: L.
        """
        size = self.depth_and_width()
        if size is None:
            return None
        layers, width = size
        return 6.0 * self._matrix_parameters() + 12.0 * layers * width * sequence_length

    def _matrix_parameters(self) -> int:
        head = self.head().weight
        # By identity: a tied head is the embedding's own parameter, and sharded parameters don't compare.
        apart = {id(module.weight) for module in self.modules() if isinstance(module, nn.Embedding)} | {
            id(head)
        }
        matrices = (p for p in self.parameters() if p.ndim >= 2 and id(p) not in apart)
        return head.numel() + sum(matrix.numel() for matrix in matrices)
