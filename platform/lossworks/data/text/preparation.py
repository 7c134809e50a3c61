"""From a corpus to shards of tokens in the cache folder."""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lossworks.data.text.corpus import documents, fingerprint, other_encodings, utf8_size
from lossworks.data.text.corpus_files import corpus_files, left_out
from lossworks.data.text.owned_tokens import OwnedTokens
from lossworks.data.text.readers import Piece
from lossworks.data.text.token_shards import (
    BYTES_FILE,
    SHARD_FORMAT,
    TOKENIZER_FILE,
    Index,
    TokenShardWriter,
    digest_of,
    narrowest_dtype,
    write_synced,
)
from lossworks.data.text.tokenized_corpus import TokenizedCorpus
from lossworks.data.text.tokenizer import (
    encode_texts,
    end_of_text_id,
    load_tokenizer,
    special_ids,
    token_bytes,
    train_tokenizer,
    training_part,
    vocabulary_size,
)
from lossworks.errors import UserError
from lossworks.files import hidden_beside, write_atomically
from lossworks.home import cache_folder
from lossworks.specs import DataSpec, TokensSpec

SHARD_TOKENS = 64 * 2**20

# Text that is encoded at once: enough for all cores, while the encodings take some 100 bytes a token.
_BATCH_CHARACTERS = 4 * 2**20
_PROGRESS_BYTES = 64 * 2**20

Progress = Callable[[str], None]


def prepare(
    spec: DataSpec,
    *,
    cache: Path | None = None,
    on_progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> TokenizedCorpus:
    """Return the corpus as tokens, encoded now or found in the cache.

    The cache goes by content: by the corpus's fingerprint and by the tokenizer, trained or given. Sequence
    length and held-out share don't matter to it. A folder appears under its name only when it is complete,
    and one that was damaged since is made again. Several processes may prepare the same corpus at once.

    Args:
        spec: What text is read and how it becomes tokens. With ``spec.tokenizer`` the vocabulary is that
            tokenizer's, whatever ``spec.vocab_size`` says.
        cache: Folder to keep tokenizers and tokens in; by default ``lossworks.home.cache_folder()``.
        on_progress: Called with a line of text now and then.
        shard_tokens: Tokens a shard file, at least 1. A corpus found in the cache keeps the shards it has.

    Raises:
        UserError: The corpus or the tokenizer can't be read, or the corpus is too small.
    """
    cache, say = opened_cache(cache), on_progress or say_nothing
    tokenizer = text_tokenizer(spec, cache, say)
    digest = fingerprint(spec)
    key = _key("corpus", digest, hashlib.sha256(tokenizer).hexdigest(), *([spec.owner] if spec.owner else []))
    folder = cache / f"corpus-{key}"
    corpus = _opened(folder)
    if corpus is None:
        encode = functools.partial(_encode, spec, tokenizer, digest, shard_tokens, say)
        make_folder(folder, encode, lambda made: _opened(made) is not None)
        corpus = TokenizedCorpus.open(folder)
    if spec.corpus.startswith("text:"):
        beside = left_out(spec)
        say(f"{len(corpus_files(spec)):,} files were read" + (f", {beside:,} left out" if beside else ""))
    if others := other_encodings(spec):
        say(f"{len(others)} files are not UTF-8 and were read as what they are: {', '.join(others[:3])}")
    say(f"the corpus has {corpus.tokens:,} tokens, {corpus.text_bytes:,} bytes of text, in {folder}")
    return corpus


def opened_cache(cache: Path | None) -> Path:
    """Return the folder that tokenizers and tokens are kept in, which is there: by default the home's."""
    found = cache_folder() if cache is None else cache.absolute()
    found.mkdir(parents=True, exist_ok=True)
    return found


def make_folder(folder: Path, fill: Callable[[Path], None], is_sound: Callable[[Path], bool]) -> None:
    """Make ``folder`` by filling one beside it and renaming that when it is complete.

    Whatever bears the name already is replaced, unless it is sound by now, since another process has made it
    meanwhile.

    Args:
        folder: What is made.
        fill: Called with the folder beside it.
        is_sound: Whether a folder of that name is what is to be made.
    """
    partial = hidden_beside(folder)
    partial.mkdir()
    try:
        fill(partial)
        while not _renamed(partial, folder) and not is_sound(folder):
            _remove(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _opened(folder: Path) -> TokenizedCorpus | None:
    """Return the corpus in a folder, or None if there is none or it is damaged."""
    try:
        return TokenizedCorpus.open(folder, whole=True)
    except UserError:
        return None


def text_tokenizer(spec: DataSpec, cache: Path, say: Progress) -> bytes:
    """Return the content of the tokenizer.json for running text; see :func:`tokenizer_file`."""
    return tokenizer_file(
        spec,
        cache,
        say,
        digest=lambda: fingerprint(training_part(spec)),
        train=lambda: train_tokenizer(spec),
    )


def tokenizer_file(
    spec: TokensSpec,
    cache: Path,
    say: Progress,
    *,
    digest: Callable[[], str],
    train: Callable[[], Any],
) -> bytes:
    """Return the content of the tokenizer.json to use: the given one, or a trained one from the cache.

    Args:
        spec: Names it, or how large it is to be.
        cache: Folder in which trained ones are kept.
        say: Called with what is going on.
        digest: Of the text that one is trained on.
        train: Gives the trained one.

    Raises:
        UserError: It can't be read or trained.
    """
    if spec.tokenizer is not None:
        load_tokenizer(spec.tokenizer)
        return Path(spec.tokenizer).expanduser().read_bytes()
    key = _key("tokenizer", digest(), str(spec.vocab_size))
    path = cache / f"tokenizer-{key}.json"
    try:
        load_tokenizer(path)
    except UserError:
        say(f"training a tokenizer of {spec.vocab_size:,} entries")
        write_atomically(path, train().to_str().encode())
    return path.read_bytes()


def _encode(
    spec: DataSpec, tokenizer_json: bytes, digest: str, shard_tokens: int, say: Progress, folder: Path
) -> None:
    """Fill ``folder`` with shards, tokenizer, bytes a token, and at last the index."""
    write_synced(folder / TOKENIZER_FILE, tokenizer_json)
    tokenizer = load_tokenizer(folder / TOKENIZER_FILE)
    vocab_size = vocabulary_size(tokenizer)
    dtype = narrowest_dtype(vocab_size)
    with TokenShardWriter(folder, dtype, shard_tokens) as writer:
        owned = OwnedTokens() if spec.owner else None
        text_bytes, ended = _write_tokens(documents(spec), tokenizer, writer, owned, say)
    if not writer.tokens:
        raise UserError(f"data.tokenizer={spec.tokenizer!r}: gives no token for the text of the corpus")
    if owned is not None:
        owned.write(folder)
    sizes = _token_bytes(tokenizer, text_bytes, writer.tokens, ended)
    np.save(folder / BYTES_FILE, sizes, allow_pickle=False)
    Index(
        format=SHARD_FORMAT,
        fingerprint=digest,
        vocab_size=vocab_size,
        end_of_text=end_of_text_id(tokenizer),
        dtype=dtype,
        tokens=writer.tokens,
        documents=ended,
        text_bytes=text_bytes,
        shards=writer.names,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
        digests={path.name: digest_of(path) for path in sorted(folder.iterdir())},
    ).write(folder)


def _write_tokens(
    pieces: Iterable[Piece],
    tokenizer: Any,
    writer: TokenShardWriter,
    owned: OwnedTokens | None,
    say: Progress,
) -> tuple[int, int]:
    """Encode and write all pieces; return the bytes of text and the number of documents that ended."""
    end = end_of_text_id(tokenizer)
    text_bytes = ended = said = 0
    for batch in _batches(pieces):
        encoded = encode_texts(tokenizer, [piece.text for piece in batch])
        for piece, tokens in zip(batch, encoded, strict=True):
            writer.write(tokens)
            text_bytes += utf8_size(piece.text)
            if piece.ends_document:
                ended += 1
                if end is not None:
                    writer.write([end])
            if owned is not None:
                owned.note(piece.owner, writer.tokens)
        if text_bytes - said >= _PROGRESS_BYTES:
            said = text_bytes
            say(f"encoded {text_bytes / 2**20:,.0f} MiB of text into {writer.tokens:,} tokens")
    return text_bytes, ended


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield lists of consecutive pieces, each about ``_BATCH_CHARACTERS`` characters together."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _token_bytes(tokenizer: Any, text_bytes: int, tokens: int, ended: int) -> np.ndarray:
    """Return the bytes each token stands for, (V,): exact int64, or float64 with the corpus's average."""
    sizes = token_bytes(tokenizer)
    if sizes is None:
        ends = 0 if end_of_text_id(tokenizer) is None else ended
        sizes = np.full(vocabulary_size(tokenizer), text_bytes / max(tokens - ends, 1))
        sizes[special_ids(tokenizer)] = 0
    return sizes


def _key(*parts: str) -> str:
    """Return a name for the content that ``parts`` determine, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([SHARD_FORMAT, *parts]).encode()).hexdigest()[:32]


def _renamed(source: Path, target: Path) -> bool:
    """Return whether ``source`` could be given the name of ``target``, which nothing may bear yet."""
    try:
        source.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a folder, under another name first, so that nobody sees it half removed."""
    doomed = hidden_beside(folder)
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return  # another process was faster
    shutil.rmtree(doomed, ignore_errors=True)


def say_nothing(_: str) -> None:
    """Take a line of progress that nobody wants."""
