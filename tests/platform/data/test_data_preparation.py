"""Prepared corpora: caching, damage, sequences and targets, and bounded memory."""

import json
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from lossworks.data import TokenizedCorpus, documents, load_tokenizer, prepare
from lossworks.data.text import preparation as preparation_module
from lossworks.errors import UserError
from lossworks.specs import DataSpec

UNKNOWN = "[UNK]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        (root / f"{number}.txt").write_text(f"document {number}: été, the end and the start\n" * 12)
    (root / "latin.txt").write_bytes(b"caf\xe9\n" * 5)
    return root


@pytest.fixture(scope="module")
def spec(folder):
    return DataSpec(corpus=f"text:{folder}", vocab_size=280, sequence_length=16)


@pytest.fixture(scope="module")
def corpus(spec, tmp_path_factory):
    return prepare(spec, cache=tmp_path_factory.mktemp("cache"), shard_tokens=100)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def word_level(path, vocabulary: dict[str, int]) -> str:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return str(path)


class TestContent:
    def test_tokens_are_the_documents_each_followed_by_the_end_token(self, corpus, spec):
        tokenizer = load_tokenizer(corpus.tokenizer_path)
        expected = "".join(piece.text + "<|endoftext|>" * piece.ends_document for piece in documents(spec))

        assert tokenizer.decode(corpus.read(0, corpus.tokens).tolist(), skip_special_tokens=False) == expected
        assert (corpus.read(0, corpus.tokens) == corpus.end_of_text).sum() == corpus.documents == 9

    def test_bytes_of_the_tokens_add_up_to_the_text(self, corpus, spec):
        text_bytes = sum(len(piece.text.encode()) for piece in documents(spec))

        assert corpus.text_bytes == text_bytes
        assert corpus.token_bytes.shape == (corpus.vocab_size,) == (280,)
        assert corpus.token_bytes[corpus.read(0, corpus.tokens)].sum() == text_bytes

    def test_shards_have_the_size_asked_for(self, corpus):
        sizes = [path.stat().st_size for path in sorted(corpus.folder.glob("*.bin"))]

        assert len(sizes) > 5
        assert set(sizes[:-1]) == {200}

    def test_large_vocabulary_takes_four_bytes_a_token(self, spec, cache, tmp_path):
        path = word_level(tmp_path / "t.json", {UNKNOWN: 0, "the": 70_000})
        corpus = prepare(spec.model_copy(update={"tokenizer": path}), cache=cache)

        assert corpus.vocab_size == 70_001
        assert corpus.read(0, corpus.tokens).dtype == np.uint32
        assert 70_000 in corpus.read(0, corpus.tokens)

    def test_given_tokenizer_without_an_end_token_joins_documents_by_nothing(self, spec, cache, tmp_path):
        path = word_level(tmp_path / "t.json", {UNKNOWN: 0, "the": 1})
        corpus = prepare(spec.model_copy(update={"tokenizer": path}), cache=cache)
        words = sum(len(piece.text.split()) for piece in documents(spec))

        assert corpus.end_of_text is None
        assert corpus.tokens == words
        assert corpus.documents == 9
        assert corpus.token_bytes[0] * words == pytest.approx(corpus.text_bytes)

    def test_average_bytes_add_up_to_the_text_too(self, spec, cache, tmp_path):
        path = word_level(tmp_path / "t.json", {UNKNOWN: 0, "the": 1, "</s>": 2})
        corpus = prepare(spec.model_copy(update={"tokenizer": path}), cache=cache)

        assert corpus.token_bytes[2] == 0
        assert corpus.token_bytes[corpus.read(0, corpus.tokens)].sum() == pytest.approx(corpus.text_bytes)

    def test_a_tokenizer_that_gives_no_tokens(self, spec, cache, tmp_path):
        path = tmp_path / "t.json"
        Tokenizer(models.BPE({"\x00": 0}, [])).save(str(path))

        with pytest.raises(UserError, match=r"data\.tokenizer='.*': gives no token"):
            prepare(spec.model_copy(update={"tokenizer": str(path)}), cache=cache)

    def test_order_of_small_and_large_batches_is_the_same(self, corpus, spec, cache, monkeypatch):
        monkeypatch.setattr(preparation_module, "_BATCH_CHARACTERS", 1)

        assert content(prepare(spec, cache=cache, shard_tokens=100).folder) == content(corpus.folder)


class TestCache:
    def test_two_caches_hold_the_same_bytes(self, spec, tmp_path):
        first, second = (prepare(spec, cache=tmp_path / name) for name in ("a", "b"))

        assert first.folder.name == second.folder.name
        assert content(first.folder) == content(second.folder)

    def test_second_time_nothing_is_made(self, spec, cache, monkeypatch):
        first = prepare(spec, cache=cache)
        for name in ("train_tokenizer", "encode_texts"):
            monkeypatch.setattr(preparation_module, name, None)
        longer = spec.model_copy(update={"sequence_length": 8, "held_out_fraction": 0.5})

        assert prepare(longer, cache=cache).folder == first.folder
        assert len(list(cache.iterdir())) == 2

    def test_default_is_the_home_folder(self, spec, tmp_path, monkeypatch):
        monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))

        assert prepare(spec).folder.parent == tmp_path / "home" / "cache"

    def test_a_relative_cache_gives_an_absolute_folder(self, spec, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        assert prepare(spec, cache=preparation_module.Path("here")).folder.parent == tmp_path / "here"

    @pytest.mark.parametrize("settings", [{"vocab_size": 270}, {"max_bytes": 2000}, {"field": "other"}])
    def test_other_content_is_made_anew(self, spec, cache, settings):
        first = prepare(spec, cache=cache)

        assert prepare(spec.model_copy(update=settings), cache=cache).folder != first.folder

    def test_the_tokenizer_is_shared_by_corpora_that_begin_alike(self, spec, cache):
        limited = spec.model_copy(update={"tokenizer_bytes": 2000, "vocab_size": 265})
        prepare(limited, cache=cache)
        prepare(limited.model_copy(update={"max_bytes": 2500}), cache=cache)

        assert len(list(cache.glob("tokenizer-*"))) == 1
        assert len(list(cache.glob("corpus-*"))) == 2

    @pytest.mark.parametrize("name", ["index.json", "shard-00000.bin", "tokenizer.json", "token_bytes.npy"])
    @pytest.mark.parametrize("how", ["missing", "truncated"])
    def test_a_damaged_folder_is_made_again(self, spec, cache, name, how):
        corpus = prepare(spec, cache=cache)
        before = content(corpus.folder)
        path = corpus.folder / name
        path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[:-1][:20])
        with pytest.raises(UserError):
            TokenizedCorpus.open(corpus.folder)

        assert content(prepare(spec, cache=cache).folder) == before
        assert not [entry for entry in cache.iterdir() if entry.name.startswith(".")]

    def test_a_damaged_tokenizer_is_trained_again(self, spec, cache):
        prepare(spec, cache=cache)
        (path,) = cache.glob("tokenizer-*")
        before = path.read_bytes()
        path.write_bytes(before[:100])
        prepare(spec, cache=cache)

        assert path.read_bytes() == before

    def test_a_failure_leaves_no_folder(self, folder, spec, cache, tmp_path):
        shutil.copytree(folder, tmp_path / "bad")
        (tmp_path / "bad" / "broken.jsonl").write_text("{")
        bad = spec.model_copy(
            update={"corpus": f"text:{tmp_path}/bad", "tokenizer": str(tmp_path / "t.json")}
        )
        word_level(tmp_path / "t.json", {UNKNOWN: 0})

        with pytest.raises(UserError, match="is not valid JSON"):
            prepare(bad, cache=cache)

        assert list(cache.iterdir()) == []

    def test_preparing_at_once_succeeds_everywhere(self, spec, cache, monkeypatch):
        # All wait for each other just before the rename, so that all but one find the name taken.
        barrier = threading.Barrier(3, timeout=60)
        encode, prepared = preparation_module._encode, []

        def encode_and_wait(*arguments):
            encode(*arguments)
            barrier.wait()

        monkeypatch.setattr(preparation_module, "_encode", encode_and_wait)
        threads = [
            threading.Thread(target=lambda: prepared.append(prepare(spec, cache=cache))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len({corpus.folder for corpus in prepared}) == 1
        assert len(prepared) == 3
        assert len(list(cache.iterdir())) == 2

    def test_processes_that_prepare_at_once_agree(self, spec, cache):
        code = (
            "import sys, pathlib; from lossworks.data import prepare; from lossworks.specs import DataSpec; "
            "spec = DataSpec.model_validate_json(sys.argv[1]); "
            "print(prepare(spec, cache=pathlib.Path(sys.argv[2])).folder)"
        )
        command = [sys.executable, "-c", code, spec.model_dump_json(), str(cache)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        folders = {process.communicate(timeout=120)[0] for process in processes}

        assert [process.returncode for process in processes] == [0, 0]
        assert len(folders) == 1

    def test_progress_is_told(self, spec, cache):
        lines: list[str] = []
        prepare(spec, cache=cache, on_progress=lines.append)

        assert lines[0] == "training a tokenizer of 280 entries"
        assert "tokens" in lines[-1]

    @pytest.mark.parametrize("corpus", ["text:/no/such/place", "text:/no/*.txt"])
    def test_missing_corpus(self, cache, corpus):
        with pytest.raises(UserError, match=r"data\.corpus="):
            prepare(DataSpec(corpus=corpus), cache=cache)


class TestSplit:
    @given(length=st.integers(2, 400), fraction=st.floats(0.001, 0.5))
    def test_sequences_tile_the_stream(self, corpus, spec, length, fraction):
        settings = {"sequence_length": length, "held_out_fraction": fraction}
        train, held_out = corpus.split(spec.model_copy(update=settings))
        total = len(train) + len(held_out)
        tokens = np.concatenate(
            [part.batch(np.arange(len(part)))["inputs"].flatten() for part in (train, held_out)]
        )
        targets = np.concatenate(
            [part.batch(np.arange(len(part)))["targets"].flatten() for part in (train, held_out)]
        )

        assert len(train) >= 1
        assert len(held_out) == max(1, int(np.ceil(fraction * total)))
        assert total * length + 1 <= corpus.tokens < (total + 1) * length + 1
        assert tokens.tolist() == corpus.read(0, total * length).tolist()
        assert targets.tolist() == corpus.read(1, total * length).tolist()

    def test_batch(self, corpus, spec):
        train, _ = corpus.split(spec)
        tokens, targets = train.batch(np.array([3, 0, 3])).values()

        assert tokens.shape == targets.shape == (3, 16)
        assert str(tokens.dtype) == str(targets.dtype) == "torch.int64"
        assert tokens.is_contiguous()
        assert targets.is_contiguous()
        assert (tokens[0] == tokens[2]).all()
        assert (targets[:, :-1] == tokens[:, 1:]).all()

    def test_batch_of_no_rows(self, corpus, spec):
        tokens, targets = corpus.split(spec)[0].batch(np.empty(0, dtype=np.int64)).values()

        assert tokens.shape == targets.shape == (0, 16)

    @pytest.mark.parametrize("row", [-1, 10**6])
    def test_row_outside(self, corpus, spec, row):
        for part in corpus.split(spec):
            with pytest.raises(IndexError, match="lies outside"):
                part.batch(np.array([row]))

    def test_a_sequence_longer_than_the_data(self, corpus, spec):
        longest = (corpus.tokens - 1) // 2
        with pytest.raises(UserError) as caught:
            corpus.split(spec.model_copy(update={"sequence_length": longest + 1}))

        message = str(caught.value)
        assert message.startswith(
            f"data.sequence_length={longest + 1}: the corpus has only {corpus.tokens} tok"
        )
        assert f"set it to {longest} or less" in message
        parts = corpus.split(spec.model_copy(update={"sequence_length": longest}))
        assert [len(part) for part in parts] == [1, 1]

    def test_a_corpus_too_small_for_any_length(self, tmp_path, cache):
        (tmp_path / "a.txt").write_text("ab")
        corpus = prepare(DataSpec(corpus=f"text:{tmp_path}", vocab_size=258), cache=cache)

        with pytest.raises(UserError, match=r"has only 3 tokens.*no length would do; give it more text"):
            corpus.split(DataSpec(sequence_length=2))


class TestOpening:
    def test_open_gives_the_same(self, corpus):
        opened = TokenizedCorpus.open(str(corpus.folder))

        assert opened.tokens == corpus.tokens
        assert opened.end_of_text == 0
        assert opened.fingerprint == corpus.fingerprint
        assert (opened.token_bytes == corpus.token_bytes).all()

    def test_it_travels_as_a_path(self, corpus, spec):
        corpus.read(0, corpus.tokens)
        sequences = pickle.loads(pickle.dumps(corpus.split(spec)[0]))  # noqa: S301

        assert len(pickle.dumps(corpus)) < 1000
        found, expected = (part.batch(np.array([1]))["inputs"] for part in (sequences, corpus.split(spec)[0]))
        assert (found == expected).all()

    def test_index_is_readable_json(self, corpus):
        index = json.loads((corpus.folder / "index.json").read_text())

        assert index["format"] == 2
        assert index["tokens"] == corpus.tokens


MEMORY_PROGRAM = """
import pathlib, resource, sys
from lossworks.data import prepare
from lossworks.specs import DataSpec

folder, tokenizer, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with (folder / "text.txt").open("w") as file:
    for number in range(size // 64):
        file.write(f"{number:015d} " * 3 + "some words here\\n")
prepare(DataSpec(corpus=f"text:{folder}", tokenizer=tokenizer), cache=folder / "cache")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_the_text(tmp_path):
    """Eight batches and one batch of text need the same memory, within a fraction of the difference."""
    tokenizer = word_level(tmp_path / "t.json", {UNKNOWN: 0, "some": 1, "words": 2, "here": 3})
    peaks = []
    for name, size in (("small", 5 * 2**20), ("large", 40 * 2**20)):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", MEMORY_PROGRAM, str(tmp_path / name), tokenizer, str(size)]
        peaks.append(int(subprocess.check_output(command, text=True)))

    assert peaks[1] - peaks[0] < 25
