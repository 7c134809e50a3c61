"""Tokenizers: training, round trips, loading, and the bytes each token stands for."""

import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lossworks.data import end_of_text_id, load_tokenizer, token_bytes, train_tokenizer
from lossworks.data.text.tokenizer import encode_texts, vocabulary_size
from lossworks.errors import UserError
from lossworks.specs import DataSpec

UNKNOWN = "[UNK]"
TEXT = "the quick brown fox jumps over the lazy dog; the end of the story.\n" * 20


def word_tokenizer() -> Tokenizer:
    """Return a tokenizer that is not byte-level."""
    tokenizer = Tokenizer(models.WordLevel({UNKNOWN: 0, "the": 1, "</s>": 2, "end": 4}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT + "été 日本 🙂\n", encoding="utf-8")
    return DataSpec(corpus=f"text:{path}", vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer(spec):
    return train_tokenizer(spec)


class TestTraining:
    def test_ids(self, tokenizer):
        assert tokenizer.token_to_id("<|endoftext|>") == end_of_text_id(tokenizer) == 0
        assert tokenizer.token_to_id("<|pad|>") == 1
        assert vocabulary_size(tokenizer) == tokenizer.get_vocab_size() == 300

    def test_twice_gives_the_same_file(self, spec, tokenizer):
        assert train_tokenizer(spec).to_str() == tokenizer.to_str()

    @given(text=st.text(max_size=100))
    def test_round_trip(self, tokenizer, text):
        (ids,) = encode_texts(tokenizer, [text])

        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text

    @given(text=st.text(max_size=100))
    def test_bytes_add_up_to_the_text(self, tokenizer, text):
        (ids,) = encode_texts(tokenizer, [text])

        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())

    def test_name_of_a_special_token_in_a_text_is_text(self, tokenizer):
        (ids,) = encode_texts(tokenizer, ["a<|endoftext|>b"])

        assert 0 not in ids
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "a<|endoftext|>b"

    def test_only_the_first_bytes_are_read(self, tmp_path):
        path = tmp_path / "text.txt"
        path.write_text("ab" * 5000 + "xyz" * 5000)
        tokenizer = train_tokenizer(
            DataSpec(corpus=f"text:{path}", vocab_size=260, tokenizer_bytes=1024, max_bytes=20_000)
        )

        assert not any("x" in token and len(token) > 1 for token in tokenizer.get_vocab() if token[0] != "<")

    def test_vocabulary_larger_than_the_text_can_give(self, tmp_path):
        (tmp_path / "a.txt").write_text("abab")

        with pytest.raises(UserError) as caught:
            train_tokenizer(DataSpec(corpus=f"text:{tmp_path}", vocab_size=5000))

        assert str(caught.value).startswith("data.vocab_size=5000: ")
        assert "gives only 260 entries; set data.vocab_size=260 or less" in str(caught.value)
        train_tokenizer(DataSpec(corpus=f"text:{tmp_path}", vocab_size=260))

    def test_error_of_the_corpus_comes_through(self, tmp_path):
        (tmp_path / "a.txt").write_text("")

        with pytest.raises(UserError, match="holds no text"):
            train_tokenizer(DataSpec(corpus=f"text:{tmp_path}", vocab_size=300))


class TestLoading:
    def test_truncation_and_padding_are_switched_off(self, tokenizer, tmp_path):
        other = Tokenizer.from_str(tokenizer.to_str())
        other.enable_truncation(2)
        other.enable_padding(length=50)
        other.save(str(tmp_path / "t.json"))

        (ids,) = encode_texts(load_tokenizer(tmp_path / "t.json"), [TEXT])

        assert ids.tolist() == tokenizer.encode(TEXT).ids

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.tokenizer='.*none\.json': no such file"):
            load_tokenizer(tmp_path / "none.json")

    def test_folder(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.tokenizer='.*': is no file"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "BPE"}}'])
    def test_invalid_file(self, tmp_path, content):
        (tmp_path / "t.json").write_text(content)

        with pytest.raises(UserError, match=r"data\.tokenizer='.*': is "):
            load_tokenizer(tmp_path / "t.json")

    def test_a_tokenizer_without_tokens(self, tmp_path):
        Tokenizer(models.BPE()).save(str(tmp_path / "t.json"))

        with pytest.raises(UserError, match="is a tokenizer without tokens"):
            load_tokenizer(tmp_path / "t.json")

    @pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>"])
    def test_end_of_text_under_other_names(self, name):
        assert end_of_text_id(Tokenizer(models.WordLevel({UNKNOWN: 0, name: 5}, unk_token=UNKNOWN))) == 5

    def test_no_end_of_text(self):
        assert end_of_text_id(Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))) is None

    def test_ids_with_holes_need_rows_up_to_the_largest(self):
        assert vocabulary_size(word_tokenizer()) == 5


class TestTokenBytes:
    def test_of_a_tokenizer_that_is_not_byte_level(self):
        assert token_bytes(word_tokenizer()) is None

    def test_specials_count_nothing_and_added_words_their_bytes(self, tokenizer):
        other = Tokenizer.from_str(tokenizer.to_str())
        other.add_tokens(["日é", "日 本"])
        other.add_special_tokens([AddedToken("<|sep|>", special=True)])
        sizes = token_bytes(other)

        assert sizes[[0, 1]].tolist() == [0, 0]
        assert sizes[300:].tolist() == [5, 7, 0]

    def test_byte_level_decoder_in_a_sequence(self, tokenizer):
        other = Tokenizer.from_str(tokenizer.to_str())
        other.decoder = decoders.Sequence([decoders.ByteLevel()])

        assert token_bytes(other).tolist() == token_bytes(tokenizer).tolist()


@pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_encodes_without_the_parents_threads(tokenizer, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as the command line does
    texts = ["some text"] * 1000
    list(encode_texts(tokenizer, texts))
    child = os.fork()
    if child == 0:
        list(encode_texts(tokenizer, texts))
        os._exit(0)

    deadline = time.monotonic() + 20
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, 9)
        os.waitpid(child, 0)

    assert done
    assert status == 0
