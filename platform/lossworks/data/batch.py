"""A batch: tensors by name. The names are declared here once, and whatever handles batches goes by that.

B rows; a row is an example, or a sequence of L tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of what counts for nothing, where targets are classes; where they are numbers it is NaN."""

Batch = Mapping[str, Tensor]
"""Tensors by name; the first axis of each is B."""


@dataclass(frozen=True)
class TensorName:
    """One name that a batch may hold.

    Attributes:
        axes: The shape, in words.
        meaning: One line.
        empty: What marks a row as one that counts for nothing, for classes and for numbers; None where the
            name has no such mark, and a stand-in keeps what was there.
    """

    axes: str
    meaning: str
    empty: tuple[int, float] | None = None


NAMES: dict[str, TensorName] = {
    "inputs": TensorName("(B, …)", "what the model reads"),
    "targets": TensorName(
        "(B, …)",
        "classes, int64, or numbers, floating point; of sets of labels (B, P), padded with -100",
        (IGNORE_INDEX, torch.nan),
    ),
    "soft_targets": TensorName("(B, K, …)", "probabilities of the classes, in place of the targets'"),
    "priors": TensorName("(B, K)", "shares of the classes that each image is expected to have"),
    "pan": TensorName("(B, H, W)", "panchromatic image of the scene that a band shows, floating point"),
    "sharp": TensorName("(B, H, W)", "the sharp band, NaN where it is not known"),
    "voice": TensorName("(B, J)", "magnitudes of a song's voice, those of a patch scaled to [0, 1]"),
    "weight": TensorName("(B, …)", "factor of each element's loss, floating point", (0, 0.0)),
    "numbers": TensorName("(B,)", "which row of its data a row is, int64"),
    "segments": TensorName("(B, …)", "which bag or step an element belongs to, int64"),
    "reference": TensorName("(B, C)", "log-probabilities of whole answers by the reference model"),
    "mismatched": TensorName(
        "(B, C)", "1 for an answer that was not meant for its prompt, and stands behind the pair; int64"
    ),
    "degrees": TensorName(
        "(B, C)",
        "of how much of the chosen answer was deleted, 0 for nothing, int64; -100 for other candidates",
        (IGNORE_INDEX, torch.nan),
    ),
    "masked_classes": TensorName("(B, M)", "classes that a comparison leaves out, int64, padded with -100"),
    "unseen": TensorName(
        "(B, C)", "log-probabilities of whole answers by a model that never saw what is to be forgotten"
    ),
    "chunks": TensorName("(B, L)", "which chunk of a text a target belongs to, int64, -1 for none"),
    "teacher_inputs": TensorName("(B, L)", "the same text in the tokens of a teacher, int64"),
    "teacher_targets": TensorName(
        "(B, L)", "tokens that follow those of the teacher, int64", (IGNORE_INDEX, torch.nan)
    ),
    "teacher_chunks": TensorName(
        "(B, L)", "which chunk a target of the teacher belongs to, int64, -1 for none"
    ),
    "teacher_log_p": TensorName("(B, M)", "log-probabilities of chunks by the teacher"),
    "teacher_word_ends": TensorName(
        "(B, M)", "log-probability that a word ends behind a chunk, by the teacher"
    ),
    "word_classes": TensorName("(B, V)", "whether a class begins with white space, bool, alike in all rows"),
    "discounts": TensorName("(B,)", "γ of the next state, 0 where there is none, floating point"),
    "next_inputs": TensorName("(B, …)", "what the model reads of the next state"),
    "next_probabilities": TensorName(
        "(B, m)", "probabilities of the next state's bins, by the target network"
    ),
}


def declare(name: str, axes: str, meaning: str, empty: tuple[int, float] | None = None) -> str:
    """Declare a name that a task of another package puts into its batches, and return it.

    Args:
        name: The new name.
        axes: The shape, in words; the first axis is B.
        meaning: One line.
        empty: See :class:`TensorName`.
    """
    NAMES[name] = TensorName(axes, meaning, empty)
    return name


def stand_in(batch: Batch) -> Batch:
    """Return a batch shaped alike whose rows count for nothing."""
    return {name: _emptied(name, value) for name, value in batch.items()}


def _emptied(name: str, value: Tensor) -> Tensor:
    empty = NAMES[name].empty if name in NAMES else None
    if empty is None:
        return value
    return torch.full_like(value, empty[value.is_floating_point()])


def on(device: torch.device, batch: Batch) -> dict[str, Tensor]:
    """Return a batch on a device."""
    return {name: value.to(device) for name, value in batch.items()}


def first(batch: Batch, rows: int) -> dict[str, Tensor]:
    """Return the first rows of a batch."""
    return {name: value[:rows] for name, value in batch.items()}
