"""Texts that a trained language model writes behind prompts."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

import numpy as np
from tokenizers import Tokenizer

from lossworks.data.text.tokenizer import encode_texts, end_of_text_id, load_tokenizer
from lossworks.errors import UserError
from lossworks.models.generation.sampling import Sampling
from lossworks.models.huggingface import HuggingFaceModel
from lossworks.models.interface import LanguageModel
from lossworks.models.pretrained import TOKENIZER, load_model, read_provenance

AT_ONCE = 64  # rows

_SPARE = 8  # tokens that are decoded beyond those that a stop string can be in


@dataclass(frozen=True)
class Continuation:
    """What a model wrote behind a prompt.

    Attributes:
        text: Without the prompt, up to the end of the document or the first stop string, which it lacks.
        tokens: How many the model wrote, the one that ended it included.
        ended: Why it is no longer: the document's ``end``, a ``stop`` string, or the ``length`` allowed.
    """

    text: str
    tokens: int
    ended: Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Writing:
    """How continuations are written.

    Attributes:
        tokens: How many to add at most.
        sampling: How they are drawn.
        stop: Strings at whose first appearance a continuation ends.
        samples: Continuations of each prompt.
        seed: Of the draws; each continuation has a stream of its own, by its prompt and its number, so that
            it is the same whatever else is asked for.
        at_once: Rows that the model reads together; it changes nothing but speed and memory.
    """

    tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    at_once: int = AT_ONCE

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: One is too small, or a stop string is empty.
        """
        for name, least in (("tokens", 0), ("samples", 1), ("seed", 0), ("at_once", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")
        if "" in self.stop:
            raise UserError("stop='': a stop string has at least one character")


class TextGenerator:
    """A language model with its tokenizer.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        ends: Tokens that end a document.
        begins: Whether a prompt begins as the tokenizer's own rules have it; otherwise it is a document of
            its own behind the token that ends the one before, as our training has it.
    """

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, ends: Sequence[int], *, begins: bool = False
    ) -> None:
        self.model, self._tokenizer = model, tokenizer
        self._ends, self._begins = tuple(ends), begins

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Return the model of a folder that ``lossworks export`` made; it isolates documents if trained so.

        Raises:
            UserError: The folder can't be read.
        """
        model, tokenizer = load_model(folder)
        end = end_of_text_id(tokenizer)
        data = read_provenance(folder).get("data") or {}
        if data.get("isolate") and end is not None:
            model.isolate(end)
        return cls(model, tokenizer, [] if end is None else [end])

    @classmethod
    def of_transformers(cls, folder: str | Path) -> Self:
        """Return a local checkpoint of the transformers library with the tokenizer.json beside it.

        Raises:
            UserError: The folder can't be read.
        """
        tokenizer = load_tokenizer(Path(folder).expanduser() / TOKENIZER, setting=f"hf:{folder}")
        model = HuggingFaceModel.load(
            Path(folder).expanduser(), vocab_size=tokenizer.get_vocab_size(with_added_tokens=True)
        )
        own = getattr(model.config, "eos_token_id", None)
        ends = {*(own if isinstance(own, list | tuple) else [own]), end_of_text_id(tokenizer)} - {None}
        return cls(model, tokenizer, sorted(ends), begins=True)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt.

        Raises:
            UserError: There are none.
        """
        text = text.encode("utf-8", "replace").decode()  # a shell may give what is no Unicode
        if self._begins:
            tokens = list(self._tokenizer.encode(text).ids)
        else:
            tokens = [*self._ends, *map(int, next(iter(encode_texts(self._tokenizer, [text]))))]
        if not tokens and not self._ends:
            raise UserError("prompt '': is empty, and the tokenizer has no token that a document begins with")
        return tokens or [self._ends[0]]

    def continuations(
        self,
        prompts: Sequence[str],
        writing: Writing,
        *,
        most: int | None = None,
        done: Callable[[int], None] | None = None,
    ) -> list[list[Continuation]]:
        """Return the continuations of each prompt, ``writing.samples`` of them.

        Args:
            prompts: Any texts.
            writing: How.
            most: Tokens of a prompt that the model sees, the last ones; None for all.
            done: Called with the number of continuations that were made since.

        Raises:
            UserError: A prompt can't be read, or is too long for the model.
            RunError: The model's logits are not finite.
        """
        tokens = [self.encode(prompt)[-most if most else None :] for prompt in prompts]
        digests = [_digest(prompt) for prompt in tokens]
        rows = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(writing.samples)]
        found: list[list[Continuation]] = [[] for _ in prompts]
        for start in range(0, len(rows), writing.at_once):
            part = rows[start : start + writing.at_once]
            written = self.model.generate(
                [tokens[prompt] for prompt, _ in part],
                writing.tokens,
                temperature=writing.sampling.temperature,
                top_p=writing.sampling.top_p,
                seeds=[(writing.seed, digests[prompt], sample) for prompt, sample in part],
                ended=lambda _, new: self._has_ended(new, writing.stop),
            )
            for (prompt, _), new in zip(part, written, strict=True):
                found[prompt].append(self._finished(tokens[prompt], new, writing.stop))
            if done is not None:
                done(len(part))
        return found

    def _has_ended(self, new: Sequence[int], stop: Sequence[str]) -> bool:
        if new[-1] in self._ends:
            return True
        if not stop:
            return False
        # A token is a byte or more of text, so that a stop string that has just appeared is in this part.
        part = new[-(max(len(text.encode()) for text in stop) + _SPARE) :]
        text = self._tokenizer.decode(part)
        return any(string in text for string in stop)

    def _finished(self, prompt: Sequence[int], new: list[int], stop: Sequence[str]) -> Continuation:
        ended = bool(new) and new[-1] in self._ends
        text = self._text(prompt, new[:-1] if ended else new)
        places = [place for place in map(text.find, stop) if place >= 0]
        if places:
            return Continuation(text[: min(places)], len(new), "stop")
        return Continuation(text, len(new), "end" if ended else "length")

    def _text(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """Return the text of new tokens behind a prompt; alone, some tokenizers drop their first space."""
        before, whole = (self._tokenizer.decode(list(ids)) for ids in (prompt, [*prompt, *new]))
        return str(whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(list(new)))


def _digest(tokens: Sequence[int]) -> int:
    """Return a number that stands for tokens."""
    return int.from_bytes(hashlib.sha256(np.array(tokens, dtype=np.int64).tobytes()).digest()[:8], "little")
