"""Tokens added one by one to prompts of unequal length, all at once.

Shapes: B rows, T tokens that are read at once, D features, V entries of the vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.models.generation.sampling import DrawSeed, Sampling, stream

Ended = Callable[[int, Sequence[int]], bool]
"""Called with a row's number and its new tokens, after each of them; says whether the row ends there."""


class Reader(Protocol):
    """A model that reads rows piece by piece and keeps what attention needs of what it has read."""

    def read(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """Read further tokens and return the features (B, D) of the last of each row.

        Args:
            tokens: (B, T) int64, behind those that were read before.
            valid: (B, T) bool: whether a token is one of its row, and not filling in front of a shorter one.
        """

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone.

        Args:
            rows: (R,) int64, their places among those that are read now.
        """


def require_prompts(prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Check what is to be continued.

    Raises:
        UserError: ``new_tokens`` is negative, or a prompt is empty.
    """
    if new_tokens < 0:
        raise UserError(f"new_tokens={new_tokens}: must be at least 0")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompts: number {row} is empty; a prompt has at least one token")


@torch.no_grad()
def decode(
    reader: Reader,
    logits: Callable[[Tensor], Tensor],
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    sampling: Sampling,
    seeds: Sequence[DrawSeed] | None,
    ended: Ended | None,
    device: torch.device,
) -> list[list[int]]:
    """Return the new tokens of each prompt.

    Shorter prompts are filled in front, so that all rows have their next token at the same place; rows that
    have ended are read no further.

    Args:
        reader: Has read nothing yet.
        logits: From features (B, D) to logits (B, V).
        prompts: B of them, one token each at least.
        new_tokens: How many to add to each at most.
        sampling: How they are drawn.
        seeds: Of each row's draws; the row's number if None.
        ended: Ends rows early; None lets all go on to the end.
        device: Of the model.
    """
    tokens, valid = _left_filled(prompts, device)
    draws = [stream(seed) for seed in (range(len(prompts)) if seeds is None else seeds)]
    found: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    for added in range(1, new_tokens + 1):
        chosen = sampling.choose(logits(reader.read(tokens, valid)), [draws[row] for row in rows])
        for row, token in zip(rows, chosen.tolist(), strict=True):
            found[row].append(int(token))
        going = [place for place, row in enumerate(rows) if ended is None or not ended(row, found[row])]
        if not going or added == new_tokens:
            break
        if len(going) < len(rows):
            left = torch.tensor(going, device=device)
            reader.keep(left)
            chosen, rows = chosen[left], [rows[place] for place in going]
        tokens, valid = chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.bool)
    return found


def _left_filled(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens (B, T) int64 with zeros in front of shorter prompts, and which are no filling."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    valid = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.as_tensor(prompt)
        valid[row, longest - len(prompt) :] = True
    return tokens.to(device), valid.to(device)
