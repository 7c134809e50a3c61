"""Shard files and their index: writing, reading across borders, and noticing damage."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossworks.data.text.token_shards import (
    SHARD_FORMAT,
    Index,
    TokenShardReader,
    TokenShardWriter,
    digest_of,
    narrowest_dtype,
)
from lossworks.errors import UserError


def write(folder, tokens, dtype="uint16", shard_tokens=7, step=5) -> Index:
    """Write tokens in steps and return the index."""
    with TokenShardWriter(folder, dtype, shard_tokens) as writer:
        for start in range(0, len(tokens), step):
            writer.write(tokens[start : start + step])
    index = Index(
        format=SHARD_FORMAT,
        fingerprint="f",
        vocab_size=10,
        end_of_text=0,
        dtype=dtype,
        tokens=len(tokens),
        documents=1,
        text_bytes=1,
        shards=writer.names,
        files={name: (folder / name).stat().st_size for name in writer.names},
        digests={name: digest_of(folder / name) for name in writer.names},
    )
    index.write(folder)
    return index


@given(
    count=st.integers(1, 60),
    shard_tokens=st.integers(1, 70),
    step=st.integers(1, 70),
    data=st.data(),
)
def test_reading_across_borders_gives_what_was_written(tmp_path_factory, count, shard_tokens, step, data):
    folder = tmp_path_factory.mktemp("shards")
    tokens = np.arange(count) * 3
    index = write(folder, tokens, shard_tokens=shard_tokens, step=step)
    start = data.draw(st.integers(0, count))
    length = data.draw(st.integers(0, count - start))

    assert index.shard_lengths()[:-1] == [shard_tokens] * (len(index.shards) - 1)
    assert Index.read(folder) == index
    read = TokenShardReader(folder, index).read(start, length)
    assert read.tolist() == tokens[start : start + length].tolist()
    assert type(read) is np.ndarray


@pytest.mark.parametrize(("dtype", "largest"), [("uint16", 2**16 - 1), ("uint32", 2**24)])
def test_ids_are_little_endian(tmp_path, dtype, largest):
    index = write(tmp_path, [1, largest], dtype=dtype)

    assert (tmp_path / index.shards[0]).read_bytes()[:2] == b"\x01\x00"
    assert TokenShardReader(tmp_path, index).read(0, 2).tolist() == [1, largest]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(258, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_narrowest_dtype(vocab_size, dtype):
    assert narrowest_dtype(vocab_size) == dtype


@pytest.mark.parametrize(("start", "count"), [(-1, 1), (0, 21), (20, 1), (0, -1)])
def test_reading_outside_is_an_index_error(tmp_path, start, count):
    reader = TokenShardReader(tmp_path, write(tmp_path, np.arange(20)))

    with pytest.raises(IndexError, match="outside a corpus of 20"):
        reader.read(start, count)


def test_a_shard_of_no_tokens_is_refused(tmp_path):
    with pytest.raises(ValueError, match="shard_tokens=0"):
        TokenShardWriter(tmp_path, "uint16", 0)


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        write(tmp_path, np.arange(20))
        return tmp_path

    def test_no_index(self, tmp_path):
        with pytest.raises(UserError, match=r"is no tokenized corpus: it holds no index\.json"):
            Index.read(tmp_path)

    def test_missing_shard(self, folder):
        (folder / "shard-00001.bin").unlink()

        with pytest.raises(UserError, match=r"shard-00001\.bin: is missing; prepare the data again"):
            Index.read(folder)

    def test_truncated_shard(self, folder):
        (folder / "shard-00001.bin").write_bytes(b"123")

        with pytest.raises(UserError, match=r"shard-00001\.bin: has 3 bytes, not 14"):
            Index.read(folder)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "x"}'])
    def test_index_that_is_none(self, folder, content):
        (folder / "index.json").write_text(content)

        with pytest.raises(UserError, match="is no index of a tokenized corpus"):
            Index.read(folder)

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"format": 99}, "has format 99; must be 2"),
            ({"tokens": 19}, "contradicts itself"),
            ({"dtype": "float64"}, "contradicts itself"),
            ({"shards": ["other.bin"]}, "contradicts itself"),
        ],
    )
    def test_index_of_another_kind(self, folder, change, expected):
        values = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(values | change))

        with pytest.raises(UserError, match=expected):
            Index.read(folder)
