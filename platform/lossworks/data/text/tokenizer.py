"""Byte-level BPE: training, loading, encoding, and how many bytes each token stands for."""

import functools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lossworks.data.text.corpus import documents
from lossworks.errors import UserError
from lossworks.specs import DataSpec, TokensSpec

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# What tokenizers made elsewhere call the end of a document, ours first.
_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "[EOS]", "<｜end▁of▁sentence｜>")


def train_tokenizer(spec: DataSpec) -> Any:
    """Return a byte-level BPE of ``spec.vocab_size`` entries trained on the corpus's first bytes.

    It is trained on ``spec.tokenizer_bytes`` bytes of text, or less where the corpus has less.

    Raises:
        UserError: The corpus can't be read, or is too small for the vocabulary.
    """
    return train_on((piece.text for piece in documents(training_part(spec))), spec)


def train_on(texts: Iterable[str], spec: TokensSpec) -> Any:
    """Return a byte-level BPE of ``spec.vocab_size`` entries trained on texts.

    Token 0 is ``<|endoftext|>``, token 1 ``<|pad|>``. Any text survives encoding and decoding. Training twice
    on the same text gives the same tokenizer.

    Raises:
        UserError: There is too little text for the vocabulary.
    """
    tokenizers = _import_tokenizers()
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        # Sorted, because the alphabet comes as a set and the order would give the ids.
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    _require_full_vocabulary(tokenizer.get_vocab_size(), spec)
    return tokenizer


def training_part(spec: DataSpec) -> DataSpec:
    """Return ``spec`` limited to the text that its tokenizer is trained on."""
    limit = spec.tokenizer_bytes if spec.max_bytes is None else min(spec.tokenizer_bytes, spec.max_bytes)
    return spec.model_copy(update={"max_bytes": limit})


def load_tokenizer(path: str | Path, *, setting: str = "data.tokenizer") -> Any:
    """Return the tokenizer in a tokenizer.json, without the truncation and padding it may ask for.

    Args:
        path: The file.
        setting: What an error calls the setting that named the file.

    Raises:
        UserError: The file is missing or holds no tokenizer.
    """
    tokenizers = _import_tokenizers()
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is no file" if file.exists() else "no such file"
        raise UserError(f"{setting}='{path}': {what}; must be a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(file.read_bytes())
    except OSError as error:
        raise UserError(f"{setting}='{path}': can't be read: {error}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{setting}='{path}': is not a valid tokenizer.json: {reason}") from None
    if not tokenizer.get_vocab_size():
        raise UserError(f"{setting}='{path}': is a tokenizer without tokens")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """Return the number of rows an embedding needs: the largest token id plus one."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def end_of_text_id(tokenizer: Any) -> int | None:
    """Return the id of the token that ends a document, or None if the tokenizer has no such token.

    Without one the documents of a corpus follow one another with nothing between them.
    """
    ids = (tokenizer.token_to_id(name) for name in _END_NAMES)
    return next((token for token in ids if token is not None), None)


def encode_texts(tokenizer: Any, texts: list[str]) -> Iterator[np.ndarray]:
    """Yield the token ids, (T,) uint32, of each text; the texts are encoded in parallel.

    No token is added, and a special token's name in the text is text like any other.
    """
    tokenizer.encode_special_tokens = True
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield np.array(encoding.ids, dtype=np.uint32)


def special_ids(tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that stand for no text, sorted."""
    added = tokenizer.get_added_tokens_decoder()
    special = {token for token, content in added.items() if content.special}
    end = end_of_text_id(tokenizer)
    return sorted(special if end is None else special | {end})


def token_bytes(tokenizer: Any) -> np.ndarray | None:
    """Return the number of UTF-8 bytes that each token stands for, (V,) int64; 0 for special tokens.

    Over the tokens of a text they add up to the bytes of the text (of the normalised text, if the tokenizer
    normalises). Ids without a token count 0.

    Returns:
        The array, or None if the tokenizer is not byte-level: then a token's bytes depend on its
        neighbours, and the corpus's average has to do.
    """
    if not _is_byte_level(tokenizer):
        return None
    alphabet = set(_import_tokenizers().pre_tokenizers.ByteLevel.alphabet())
    sizes = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        # One character stands for one byte, unless the token was not made of the alphabet at all.
        sizes[index] = len(token) if alphabet.issuperset(token) else len(token.encode())
    for index, added in tokenizer.get_added_tokens_decoder().items():
        sizes[index] = len(added.content.encode())
    sizes[special_ids(tokenizer)] = 0
    return sizes


def line_ends(path: Path, vocab_size: int) -> np.ndarray:
    """Return which tokens of a tokenizer.json hold the end of a line, bool (V,)."""
    tokenizer = load_tokenizer(path)
    return np.array(["\n" in tokenizer.decode([token]) for token in range(vocab_size)])


def _is_byte_level(tokenizer: Any) -> bool:
    decoders = _import_tokenizers().decoders
    decoder = tokenizer.decoder
    if isinstance(decoder, decoders.Sequence):
        return "ByteLevel" in repr(decoder)
    return isinstance(decoder, decoders.ByteLevel)


def _require_full_vocabulary(entries: int, spec: TokensSpec) -> None:
    if entries < spec.vocab_size:
        raise UserError(
            f"data.vocab_size={spec.vocab_size}: the text that the tokenizer is trained on gives only "
            f"{entries} entries; set data.vocab_size={entries} or less, or give it more text "
            f"(data.corpus, data.max_bytes, data.tokenizer_bytes={spec.tokenizer_bytes}), name one in "
            "data.tokenizer, or begin from a model that has one: start=RUN"
        )


@functools.cache
def _import_tokenizers() -> Any:
    """Import the library, and make it safe to fork afterwards.

    Its threads do not survive a fork, so a child that encodes in parallel would wait for ever. It guards
    against that only while TOKENIZERS_PARALLELISM is unset, and the command line sets it.
    """
    import tokenizers
    import tokenizers.decoders
    import tokenizers.models
    import tokenizers.pre_tokenizers
    import tokenizers.trainers

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_encode_serially)
    return tokenizers


def _encode_serially() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
