"""Corpora: what is read, in which order, where it is cut, and what the fingerprint sees."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from lossworks.data import Piece, documents, fingerprint
from lossworks.data.text import readers as readers_module
from lossworks.errors import UserError
from lossworks.specs import DataSpec


def texts(corpus: str, **settings) -> list[str]:
    """Return the whole documents of a corpus."""
    return joined(documents(DataSpec(corpus=corpus, **settings)))


def joined(pieces) -> list[str]:
    result, parts = [], []
    for piece in pieces:
        parts.append(piece.text)
        if piece.ends_document:
            result.append("".join(parts))
            parts = []
    return result + (["".join(parts)] if parts else [])


def error_of(corpus: str, **settings) -> str:
    with pytest.raises(UserError) as caught:
        list(documents(DataSpec(corpus=corpus, **settings)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_jsonl(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _datasets_cache(tmp_path_factory, monkeypatch):
    """Keep the lock files of the datasets library out of the home folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "corpus"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.txt").write_text("alpha")
    (root / "deep" / "b.md").write_text("beta")
    (root / "deep" / "er" / "c.py").write_text("gamma = 3\n")
    (root / "deep" / "ignored.png").write_bytes(b"\x89PNG")
    (root / "empty.txt").write_text("")
    return root


class TestFiles:
    def test_one_file(self, folder):
        assert list(documents(DataSpec(corpus=f"text:{folder / 'a.txt'}"))) == [Piece("alpha", True)]

    def test_folder_is_read_recursively_and_empty_files_are_left_out(self, folder):
        assert sorted(texts(f"text:{folder}")) == ["alpha", "beta", "gamma = 3\n"]

    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("*.txt", ["alpha"]),
            ("**/*.md", ["beta"]),
            ("deep/*", ["beta"]),
            ("d*p/er/?.py", ["gamma = 3\n"]),
        ],
    )
    def test_glob(self, folder, pattern, expected):
        assert texts(f"text:{folder}/{pattern}") == expected

    def test_a_file_whose_name_looks_like_a_pattern_is_a_file(self, tmp_path):
        (tmp_path / "a[1].txt").write_text("one")

        assert texts(f"text:{tmp_path}/a[1].txt") == ["one"]

    def test_order_is_no_alphabet_and_does_not_depend_on_the_place(self, tmp_path):
        here, there = tmp_path / "here", tmp_path / "there"
        here.mkdir()
        names = [f"{number:03d}" for number in range(50)]
        for name in names:
            (here / f"{name}.txt").write_text(name)
        shutil.copytree(here, there)

        visited = texts(f"text:{here}")

        assert sorted(visited) == names
        assert visited != names
        assert visited == texts(f"text:{there}")

    def test_bytes_that_are_not_utf8_are_windows_1252(self, tmp_path):
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9 \xff\xfe ok")

        assert texts(f"text:{tmp_path}/latin.txt") == ["café ÿþ ok"]

    def test_line_ends_stay_as_they_are(self, tmp_path):
        (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\rthree\n")

        assert texts(f"text:{tmp_path}") == ["one\r\ntwo\rthree\n"]

    def test_stdlib_is_the_interpreters_own_sources(self):
        pieces = list(documents(DataSpec(corpus="stdlib", max_bytes=300_000)))

        assert sum(len(piece.text.encode()) for piece in pieces) in range(299_997, 300_001)
        assert any("import " in piece.text for piece in pieces)


class TestPieces:
    @given(
        text=st.text(alphabet="ab\né", max_size=200),
        size=st.integers(min_value=1, max_value=50),
        limit=st.integers(min_value=1, max_value=300),
    )
    def test_pieces_join_to_the_text_and_stay_small(self, text, size, limit, tmp_path_factory):
        path = tmp_path_factory.mktemp("pieces") / "text.txt"
        path.write_text(text + "!", encoding="utf-8", newline="")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(readers_module, "PIECE_CHARACTERS", size)
            pieces = list(documents(DataSpec(corpus=f"text:{path}")))
            limited = list(documents(DataSpec(corpus=f"text:{path}", max_bytes=limit + 1)))

        assert "".join(piece.text for piece in pieces) == text + "!"
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert all(0 < len(piece.text) <= 2 * size for piece in pieces)
        expected = (text + "!").encode()[: limit + 1].decode(errors="ignore")
        assert "".join(piece.text for piece in limited) == expected
        assert limited[-1].ends_document == (expected == text + "!")

    def test_a_long_file_is_cut_at_line_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 100)
        lines = [f"line {number}\n" for number in range(100)]
        (tmp_path / "long.txt").write_text("".join(lines))

        pieces = list(documents(DataSpec(corpus=f"text:{tmp_path}")))

        assert len(pieces) > 5
        assert all(piece.text.endswith("\n") for piece in pieces)

    def test_a_long_record_comes_in_pieces(self, tmp_path, monkeypatch):
        monkeypatch.setattr(readers_module, "PIECE_CHARACTERS", 100)
        write_jsonl(tmp_path / "a.jsonl", {"text": "word\n" * 100}, {"text": "second"})

        pieces = list(documents(DataSpec(corpus=f"text:{tmp_path}")))

        assert len(pieces) > 4
        assert joined(pieces) == ["word\n" * 100, "second"]

    def test_max_bytes_counts_over_files_and_never_cuts_a_character(self, tmp_path):
        (tmp_path / "a.txt").write_text("éé")
        (tmp_path / "b.txt").write_text("éé")

        pieces = list(documents(DataSpec(corpus=f"text:{tmp_path}", max_bytes=7)))

        assert pieces == [Piece("éé", True), Piece("é", False)]


class TestRecords:
    def test_jsonl_gives_a_document_a_line(self, tmp_path):
        path = write_jsonl(
            tmp_path / "a.jsonl", {"body": "one\ntwo"}, {"body": ""}, {"body": None}, {"body": "é"}
        )
        path.write_text(path.read_text() + "\n\n")

        assert texts(f"text:{path}", field="body") == ["one\ntwo", "é"]

    def test_lone_surrogates_in_jsonl_become_replacement_characters(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n')

        assert texts(f"text:{path}") == ["a�b \U0001f600"]

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    def test_parquet_gives_a_document_a_row(self, tmp_path, kind):
        rows = [f"row {number}" for number in range(200)] + [None, ""]
        column = pa.array(rows).cast(kind)
        parquet.write_table(pa.table({"body": column, "id": range(202)}), tmp_path / "a.parquet")

        assert texts(f"text:{tmp_path}", field="body") == rows[:200]

    def test_local_folder_through_the_datasets_library(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", {"body": "one"}, {"body": "two"})

        assert texts(f"hf:{tmp_path}", field="body") == ["one", "two"]


class TestErrors:
    def test_missing_path(self, tmp_path):
        assert (
            error_of(f"text:{tmp_path}/none") == f"data.corpus='text:{tmp_path}/none': no such file or folder"
        )

    def test_missing_path_is_noticed_before_iterating(self, tmp_path):
        with pytest.raises(UserError, match="no such file or folder"):
            documents(DataSpec(corpus=f"text:{tmp_path}/none"))

    def test_folder_with_no_readable_file(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"x")

        assert "holds no file with a suffix .txt, .md, .py, .jsonl or .parquet" in error_of(
            f"text:{tmp_path}"
        )

    def test_glob_without_a_match(self, tmp_path):
        assert "no file matches the pattern" in error_of(f"text:{tmp_path}/*.txt")

    @pytest.mark.parametrize("name", ["a.csv", "*.csv"])
    def test_unknown_suffix(self, tmp_path, name):
        (tmp_path / "a.csv").write_text("x")

        assert "unknown suffix '.csv'; must be .txt, .md" in error_of(f"text:{tmp_path}/{name}")

    def test_empty_corpus(self, tmp_path):
        (tmp_path / "a.txt").write_text("")

        assert error_of(f"text:{tmp_path}") == f"data.corpus='text:{tmp_path}': holds no text"

    def test_no_text_within_the_limit(self, tmp_path):
        (tmp_path / "a.txt").write_text("é")

        assert error_of(f"text:{tmp_path}", max_bytes=1).endswith("holds no text within data.max_bytes=1")

    def test_unreadable_file(self, tmp_path, monkeypatch):
        path = tmp_path / "a.txt"
        path.write_text("x")

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)

        assert error_of(f"text:{path}").startswith(f"{path}: can't be read: ")

    def test_line_that_is_not_json(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
        path.write_text(path.read_text() + "\n{oops\n")

        assert f"{path}, line 3: is not valid JSON" in error_of(f"text:{path}")

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("[1]", "line 1: holds a list; a record is an object with named fields"),
            ('{"a": 1, "b": 2}', "line 1: data.field='text': no such field; there are: a, b"),
            ("{}", "line 1: data.field='text': no such field; there are: none"),
            ('{"text": 5}', "line 1: data.field='text' holds a int; must hold a string"),
        ],
    )
    def test_record_without_text(self, tmp_path, line, expected):
        (tmp_path / "a.jsonl").write_text(line)

        assert expected in error_of(f"text:{tmp_path}")

    def test_missing_parquet_column(self, tmp_path):
        parquet.write_table(pa.table({"a": ["x"], "b": ["y"]}), tmp_path / "a.parquet")

        assert "data.field='text': no such column; there are: a, b" in error_of(f"text:{tmp_path}")

    def test_parquet_column_of_numbers(self, tmp_path):
        parquet.write_table(pa.table({"text": [1]}), tmp_path / "a.parquet")

        assert "is a column of int64; must be a column of strings" in error_of(f"text:{tmp_path}")

    def test_broken_parquet_file(self, tmp_path):
        (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")

        assert "a.parquet: can't be read: ArrowInvalid" in error_of(f"text:{tmp_path}")

    def test_missing_field_of_a_data_set(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", {"a": "one"})

        assert "data.field='text': no such field; there are: a" in error_of(f"hf:{tmp_path}")

    def test_hub_that_is_away(self, monkeypatch):
        import datasets

        def refuse(*_, **__):
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(datasets, "load_dataset", refuse)

        expected = "data.corpus='hf:some/name': can't be loaded: ConnectionError: no route to host"
        assert error_of("hf:some/name") == expected

    def test_missing_datasets_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)

        assert "pip install 'lossworks[hf]'" in error_of("hf:some/name")


class TestFingerprint:
    def test_goes_by_content_not_by_place_or_date(self, folder, tmp_path):
        there = tmp_path / "there"
        shutil.copytree(folder, there, copy_function=shutil.copyfile)

        assert fingerprint(DataSpec(corpus=f"text:{folder}")) == fingerprint(DataSpec(corpus=f"text:{there}"))

    @pytest.mark.parametrize("settings", [{"field": "body"}, {"max_bytes": 3}])
    def test_sees_the_settings(self, folder, settings):
        spec = DataSpec(corpus=f"text:{folder}")

        assert fingerprint(spec) != fingerprint(spec.model_copy(update=settings))

    def test_sees_names_and_bytes(self, folder):
        spec = DataSpec(corpus=f"text:{folder}")
        seen = {fingerprint(spec)}
        (folder / "a.txt").write_text("alphb")
        seen.add(fingerprint(spec))
        (folder / "a.txt").rename(folder / "z.txt")
        seen.add(fingerprint(spec))

        assert len(seen) == 3

    @pytest.mark.parametrize("name", ["sequence_length", "held_out_fraction", "vocab_size"])
    def test_does_not_see_what_comes_later(self, folder, name):
        spec = DataSpec(corpus=f"text:{folder}")
        value = {"sequence_length": 7, "held_out_fraction": 0.4, "vocab_size": 999}[name]

        assert fingerprint(spec) == fingerprint(spec.model_copy(update={name: value}))

    def test_with_a_limit_only_what_is_read_counts(self, tmp_path):
        path = tmp_path / "a.txt"
        spec = DataSpec(corpus=f"text:{path}", max_bytes=100)
        path.write_text("x" * 1000)
        before = fingerprint(spec)
        path.write_text("x" * 900 + "y" * 500)
        same = fingerprint(spec)
        path.write_text("x" * 99 + "y" * 901)

        assert before == same != fingerprint(spec)

    def test_local_data_set_counts_by_content(self, tmp_path):
        spec = DataSpec(corpus=f"hf:{tmp_path}")
        write_jsonl(tmp_path / "train.jsonl", {"text": "one"})
        before = fingerprint(spec)
        write_jsonl(tmp_path / "train.jsonl", {"text": "two"})

        assert before != fingerprint(spec)

    def test_data_set_on_the_hub_counts_by_revision(self, monkeypatch):
        import datasets

        class Builder:
            config_id = "default"
            hash = "first"

        monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: Builder())
        before = fingerprint(DataSpec(corpus="hf:some/name"))
        other = fingerprint(DataSpec(corpus="hf:some/other"))
        Builder.hash = "second"

        assert len({before, other, fingerprint(DataSpec(corpus="hf:some/name"))}) == 3


def test_importing_the_package_leaves_heavy_libraries_alone():
    code = "import sys, lossworks.data; print({'tokenizers', 'pyarrow', 'datasets'} & set(sys.modules))"

    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"
