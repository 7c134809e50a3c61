"""What text is read, and how it becomes tokens: running text, answers, preferences, facts to forget."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from lossworks.specs.base import Spec

_FACTS = "facts:"


class TokensSpec(Spec):
    """How text becomes sequences of tokens."""

    tokenizer: str | None = Field(
        None, description="path of a tokenizer.json; without it a byte-level BPE is trained on the data"
    )
    vocab_size: int = Field(
        16384, ge=258, le=2**24, description="entries of the trained tokenizer; 256 bytes + 2 are the least"
    )
    tokenizer_bytes: int = Field(
        16 * 2**20, ge=1024, description="bytes of text that the tokenizer is trained on, from the start"
    )
    sequence_length: int = Field(256, ge=2, le=2**20, description="tokens a sequence")
    held_out_fraction: float = Field(
        0.02, gt=0.0, le=0.5, description="share of the sequences kept for evaluation, from the data's end"
    )
    chat_template: str | None = Field(
        None,
        description="path of a Jinja template by which records with messages become text; without it that "
        "beside the tokenizer, or else ROLE: TEXT, a line each",
    )


class DataSpec(TokensSpec):
    """What text is read, how it becomes tokens, and how long a sequence is."""

    corpus: str = Field(
        "stdlib",
        description="stdlib (the interpreter's own sources), text:PATH (a file, folder or glob of .txt, "
        ".md, .py, .jsonl, .parquet), hf:NAME (the datasets library; needs a network), or prompts with "
        "answers, of which the answers are trained: pairs:PATH (.jsonl or .parquet with prompt and answer, "
        "or messages), docstrings (a function's signature, and its docstring), names (a docstring, and its "
        "function's name), facts:N (codes of N names)",
    )
    field: str = Field("text", min_length=1, description="field of .jsonl records, column of .parquet files")
    follow_links: bool = Field(False, description="whether a folder's links to files outside of it are read")
    owner: str | None = Field(
        None,
        min_length=1,
        description="whom text belongs to: folder (the first folder below the corpus's root; a file there is "
        "an owner of its own), file, or a field of .jsonl records or column of .parquet files. No sequence "
        "then holds text of two, and of each owner's a share is held out",
    )
    max_bytes: int | None = Field(None, ge=1, description="read at most so many bytes of text; all if unset")
    isolate: bool = Field(
        False,
        description="no token of a sequence sees a document before its own; each begins with the token that "
        "ended the one before",
    )
    packed: bool = Field(
        False,
        description="with prompts and answers: several stand in one sequence, as many as there is room for; "
        "with isolate they don't see each other",
    )

    @property
    def answered(self) -> bool:
        """Whether it is prompts with answers, of which the answers are trained."""
        return self.corpus.partition(":")[0] in ("pairs", "docstrings", "names", "facts")

    @property
    def by_heart(self) -> bool:
        """Whether answers can only be known by heart, and are measured where they are trained."""
        return self.corpus.startswith(_FACTS)

    @field_validator("corpus")
    @classmethod
    def _known_corpus(cls, value: str) -> str:
        kind, colon, name = value.partition(":")
        if value in ("stdlib", "docstrings", "names") or (kind in ("text", "hf", "pairs") and colon and name):
            return value
        if value.startswith(_FACTS):
            return _counted(value)
        raise ValueError("must be stdlib, text:PATH, hf:NAME, pairs:PATH, docstrings, names or facts:N")

    @model_validator(mode="after")
    def _packs_answers(self) -> Self:
        if self.packed and not self.answered:
            raise ValueError(
                f"packed=true is for prompts with answers; corpus={self.corpus} is packed anyway"
            )
        if self.owner is not None and (self.answered or self.corpus.startswith("hf:")):
            raise ValueError(f"owner={self.owner}: corpus={self.corpus} doesn't say whose a text is")
        if self.max_bytes is not None and self.answered:
            raise ValueError(
                f"max_bytes={self.max_bytes} has no effect with corpus={self.corpus}: leave it out"
            )
        return self


class PreferenceDataSpec(TokensSpec):
    """Prompts with two answers each, of which one is preferred."""

    corpus: str = Field(
        "docstrings",
        description="preferences:PATH (.jsonl or .parquet with prompt, chosen and rejected), or docstrings "
        "(a function's signature with its own docstring, and with another one's)",
    )
    held_out_fraction: float = Field(
        0.1, gt=0.0, le=0.5, description="share of the pairs kept for evaluation, from the data's end"
    )

    @field_validator("corpus")
    @classmethod
    def _known_corpus(cls, value: str) -> str:
        kind, colon, name = value.partition(":")
        if value == "docstrings" or (kind == "preferences" and colon and name):
            return value
        raise ValueError("must be preferences:PATH or docstrings")


class UnlearningDataSpec(TokensSpec):
    """What is to be forgotten, and what is to stay; both are prompts with answers."""

    corpus: str = Field(
        "facts:40",
        description="facts:N (codes of N names, of which the first half is to be forgotten), or "
        "forget-and-retain, which `forget` and `retain` name",
    )
    forget: str | None = Field(
        None, description="pairs:PATH of what is to be forgotten (.jsonl or .parquet with prompt and answer)"
    )
    retain: str | None = Field(None, description="pairs:PATH of what is to stay")

    @field_validator("corpus")
    @classmethod
    def _known_corpus(cls, value: str) -> str:
        if value == "forget-and-retain":
            return value
        if value.startswith(_FACTS):
            return _counted(value, least=2)
        raise ValueError("must be facts:N or forget-and-retain")

    @field_validator("forget", "retain")
    @classmethod
    def _is_pairs(cls, value: str | None) -> str | None:
        if value is not None and not value.partition("pairs:")[2]:
            raise ValueError("must be pairs:PATH")
        return value

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        named = [name for name in ("forget", "retain") if getattr(self, name) is not None]
        if self.corpus.startswith(_FACTS):
            if named:
                raise ValueError(
                    f"{named[0]} has no effect with corpus={self.corpus}: set corpus=forget-and-retain"
                )
        elif len(named) < 2:
            raise ValueError("corpus=forget-and-retain needs both forget=pairs:PATH and retain=pairs:PATH")
        return self


def facts_in(corpus: str) -> int:
    """Return N of ``facts:N``."""
    return int(corpus.removeprefix(_FACTS))


def _counted(value: str, least: int = 1) -> str:
    text = value.removeprefix(_FACTS)
    if not (text.isdecimal() and least <= int(text) <= 10_000):
        raise ValueError(f"facts:N must have a whole number N from {least} to 10000")
    return value
