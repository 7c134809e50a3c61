"""Files of others: read right, or refused in one line that names them, and never as something else."""

import contextlib
import os
import struct
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from lossworks.data import documents, load_examples, prepare
from lossworks.data.text.corpus import other_encodings
from lossworks.data.text.tokenizer import load_tokenizer
from lossworks.errors import UserError
from lossworks.specs import DataSpec, ExamplesSpec

X = np.random.default_rng(0).standard_normal((20, 3))


def examples(source, **changes):
    data = load_examples(ExamplesSpec(source=source, standardise=False, **changes), 0)
    whole = np.concatenate([data.train.inputs.numpy(), data.held_out.inputs.numpy()])
    return data.names, whole


def npz(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([b"cat", b"dog"] * 10), ("cat", "dog")),
        (np.arange(20) % 2 > 0, ("False", "True")),
        (np.array([10, 9] * 10), ("9", "10")),
        (np.array(["10", "9"] * 10), ("9", "10")),
    ],
)
def test_labels_are_what_they_say(labels, names, tmp_path):
    assert examples(npz(tmp_path / "a.npz", x=X, y=labels))[0] == names


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["2020-01-01", "NaT"] * 10, dtype="datetime64[D]"),
        np.array([1j, 2] * 10),
        np.array([(1, 2.0), (2, 1.0)] * 10, dtype=[("a", int), ("b", float)]),
        np.array(["a", "b"] * 10, dtype=object),
        np.array([1.0, np.nan] * 10),
    ],
    ids=["dates", "complex", "structured", "objects", "nan"],
)
def test_labels_that_are_none_are_refused(labels, tmp_path):
    with pytest.raises(UserError):
        examples(npz(tmp_path / "a.npz", x=X, y=labels))


def test_damaged_arrays_are_refused_by_name(tmp_path):
    """Flipped and cut bytes, another format of numpy's, a pickle."""
    good = tmp_path / "good.npz"
    np.savez_compressed(good, x=np.random.default_rng(0).standard_normal((200, 50)), y=np.arange(200) % 3)
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[600:660] = bytes(byte ^ 0xFF for byte in flipped[600:660])
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "cut.npz").write_bytes(content[:5000])
    (tmp_path / "text.npz").write_text("no array")
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, X)
    with (tmp_path / "objects.npz").open("wb") as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    for name in ("flipped", "cut", "text", "array", "objects"):
        with pytest.raises(UserError, match=f"{name}.npz"):
            examples(f"npz:{tmp_path}/{name}.npz")


def fill(folder, image, suffix="png", below=""):
    for name in "ab":
        own = folder / name / below
        own.mkdir(parents=True, exist_ok=True)
        for number in range(4):
            image(number).save(own / f"{number}.{suffix}")
    return f"imagefolder:{folder}"


def grey(number, side=8):
    return Image.fromarray((np.random.default_rng(number).random((side, side)) * 255).astype("uint8"))


def deep(number):
    return Image.fromarray((np.random.default_rng(number).random((8, 8)) * 65535).astype("uint16"))


def test_sixteen_bits_are_not_white(tmp_path):
    """An X-ray has the brightness of its eight-bit copy."""
    _, found = examples(fill(tmp_path, deep), image_size=8)
    assert found.shape == (8, 3, 8, 8)
    assert 0.3 < found.mean() < 0.7
    assert len(np.unique(found)) > 200
    real = fill(tmp_path / "real", lambda _: Image.fromarray(np.full((8, 8), 0.5, "float32")), "tiff")
    (tmp_path / "real/a/0.tiff").rename(tmp_path / "real/a/0.png")
    with pytest.raises(UserError, match="of unknown white"):
        examples(real, image_size=8)


def test_images_at_any_depth_and_none_that_are_hidden(tmp_path):
    source = fill(tmp_path, grey)
    fill(tmp_path, grey, below="more/deeper")
    (tmp_path / "a/._0.png").write_bytes(b"\0\5\26\7Mac OS X")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/x.png").write_bytes(b"x")
    names, found = examples(source, image_size=8)

    assert names == ("a", "b")
    assert len(found) == 16


def test_links_out_of_a_folder_are_followed_only_if_asked(tmp_path):
    source = fill(tmp_path / "images", grey)
    grey(9).save(tmp_path / "outside.png")
    (tmp_path / "images/a/9.png").symlink_to(tmp_path / "outside.png")
    assert len(examples(source, image_size=8)[1]) == 8
    assert len(examples(source, image_size=8, follow_links=True)[1]) == 9
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/in.txt").write_text("inside")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "texts/out.txt").symlink_to(tmp_path / "secret.txt")
    corpus = f"text:{tmp_path / 'texts'}"
    assert [piece.text for piece in documents(DataSpec(corpus=corpus))] == ["inside"]
    both = {piece.text for piece in documents(DataSpec(corpus=corpus, follow_links=True))}
    assert both == {"inside", "secret"}


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_damaged_images_are_refused_by_name(tmp_path):
    """Cut, flipped anywhere, or far larger than any image."""
    source = fill(tmp_path, lambda number: grey(number, 32))
    file = tmp_path / "a/0.png"
    good = file.read_bytes()
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    bomb = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    for content in (good[:60], b"\x89PNG\r\n\x1a\n" + bomb, b"", b"GIF"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a/0.png, as an image: can't be read"):
            examples(source, image_size=8)
    for at in range(8, len(good), 37):
        damaged = bytearray(good)
        damaged[at] ^= 0xFF
        file.write_bytes(damaged)
        with contextlib.suppress(UserError):  # some bytes decide nothing; no other error may come
            examples(source, image_size=8)


def text_of(path, **changes):
    return "".join(piece.text for piece in documents(DataSpec(corpus=f"text:{path}", **changes)))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"]
)
def test_text_is_read_in_its_own_encoding(encoding, suffix, tmp_path):
    """Told by its mark, its zeros, or that it is no UTF-8; and whoever prepares it is told."""
    words = "hällo wörld, this is a text of some length\n"
    content = f'{{"text": "{words.strip()}"}}\n' if suffix == "jsonl" else words
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.encode(encoding))
    spec = DataSpec(corpus=f"text:{path}")

    assert text_of(path).strip() == words.strip()
    assert bool(other_encodings(spec)) == (encoding not in ("utf-8", "utf-8-sig"))


def test_a_limit_counts_what_is_read_of_any_encoding(tmp_path):
    """A change behind it changes nothing, and one before it does."""
    from lossworks.data.text.corpus import fingerprint

    for encoding in ("utf-8", "utf-16", "cp1252"):
        path = tmp_path / f"{encoding}.txt"
        spec = DataSpec(corpus=f"text:{path}", max_bytes=100)
        digests = []
        for start, end in (("a", "b"), ("a", "c"), ("x", "b")):
            path.write_bytes((start + "word " * 400 + end).encode(encoding))
            digests.append(fingerprint(spec))
            assert len(text_of(path, max_bytes=100).encode()) == 100
        assert digests[0] != digests[2]
        assert digests[0] == digests[1] or encoding == "utf-16"  # which counts as a whole


def test_what_is_no_text_is_refused_by_name(tmp_path):
    for name, content in (("zeros.txt", b"a\0b\n"), ("program.txt", bytes(range(256)) * 40)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: holds zero bytes"):
            text_of(tmp_path / name)
    invalid = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(struct.pack("<3i", 0, 3, 6)), pa.py_buffer(b"abc\xd4x\xff")]
    )
    parquet.write_table(pa.table({"text": invalid}), tmp_path / "invalid.parquet")
    (tmp_path / "zero.parquet").write_bytes(b"")
    raw = bytearray((tmp_path / "invalid.parquet").read_bytes())
    raw[20:40] = b"\xff" * 20
    (tmp_path / "corrupt.parquet").write_bytes(raw)
    for name in ("invalid", "zero", "corrupt"):
        with pytest.raises(UserError, match=f"{name}.parquet"):
            text_of(tmp_path / f"{name}.parquet")


def test_pipes_are_not_opened(tmp_path):
    """They would never end."""
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match="is no file"):
        examples(f"csv:{tmp_path / 'pipe.csv'}")
    with pytest.raises(UserError, match="no such file or folder"):
        text_of(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=r"is no file; must be a tokenizer.json"):
        load_tokenizer(tmp_path / "pipe.txt")


def test_a_cache_whose_bytes_were_damaged_is_made_again(tmp_path):
    """Also where its files have the sizes that they should have."""
    path = tmp_path / "a.txt"
    path.write_text("the quick brown fox " * 400)
    spec = DataSpec(corpus=f"text:{path}", vocab_size=270, sequence_length=8)
    corpus = prepare(spec, cache=tmp_path / "cache")
    expected = corpus.read(0, corpus.tokens)
    shard = next(corpus.folder.glob("shard-*.bin"))
    content = bytearray(shard.read_bytes())
    content[10:20] = bytes(10)
    shard.write_bytes(content)
    again = prepare(spec, cache=tmp_path / "cache")

    assert np.array_equal(again.read(0, again.tokens), expected)


def test_members_that_are_no_arrays_are_named(tmp_path):
    """numpy hands them on as bytes."""
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as file:
        file.writestr("x.npy", b"hello")
        file.writestr("y.npy", b"abc")
    with pytest.raises(UserError, match=r"raw\.npz: x is no array"):
        examples(f"npz:{tmp_path / 'raw.npz'}")


def test_a_photograph_is_read_as_it_is_shown(tmp_path):
    """Cameras store how they were held."""
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    for number in range(4):
        folder = tmp_path / f"{number % 2}"
        folder.mkdir(exist_ok=True)
        image, turned = Image.fromarray(pixels), Image.Exif()
        turned[0x0112] = 6  # the left is to be shown at the top
        image.save(folder / f"{number}.png", exif=turned)
    _, found = examples(f"imagefolder:{tmp_path}")

    assert found[0, 0, 4].min() > 0.99
    assert found[0, 0, -4].max() < 0.01
