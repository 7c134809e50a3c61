"""The files that a corpus consists of, and the order in which they are visited."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lossworks.errors import UserError
from lossworks.files import within
from lossworks.specs import DataSpec

PLAIN_SUFFIXES = (".txt", ".md", ".py")
RECORD_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = PLAIN_SUFFIXES + RECORD_SUFFIXES


class SourceFile(NamedTuple):
    """One file of a corpus.

    Attributes:
        path: Where the file lies.
        name: Its path relative to the corpus's root, with ``/``; the same on every machine.
    """

    path: Path
    name: str


def corpus_files(spec: DataSpec) -> list[SourceFile]:
    """Return the files of a ``stdlib`` or ``text:PATH`` corpus in the order in which they are visited.

    The order follows a hash of the relative path, so that a corpus's first and last files are random
    samples of it, and is the same wherever the corpus lies.

    Raises:
        UserError: There is no such file or folder, or nothing in it can be read.
    """
    files = _stdlib_files() if spec.corpus == "stdlib" else _text_files(spec.corpus, links=spec.follow_links)
    return sorted(files, key=lambda file: (hashlib.sha256(_name_bytes(file)).digest(), file.name))


def left_out(spec: DataSpec) -> int:
    """Return how many files of a ``text:FOLDER`` are not read: of other kinds, or linked from elsewhere."""
    folder = Path(spec.corpus.removeprefix("text:")).expanduser()
    if not spec.corpus.startswith("text:") or not folder.is_dir():
        return 0
    return sum(path.is_file() for path in folder.rglob("*")) - len(corpus_files(spec))


def folder_files(folder: Path) -> list[SourceFile]:
    """Return all files below ``folder`` that are not hidden, sorted by name."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = [SourceFile(path, path.relative_to(folder).as_posix()) for path in paths]
    shown = [file for file in files if not any(part.startswith(".") for part in file.name.split("/"))]
    return sorted(shown, key=lambda file: file.name)


def _name_bytes(file: SourceFile) -> bytes:
    return file.name.encode("utf-8", errors="surrogateescape")


def _stdlib_files() -> list[SourceFile]:
    """Return the interpreter's own sources, without what was installed beside them."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, subfolders, names in os.walk(root):
        # Pruned, not filtered: what is installed is often far more than the library.
        subfolders[:] = [name for name in subfolders if name not in ("site-packages", "dist-packages")]
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"data.corpus='stdlib': {root} holds no .py files; use text:PATH")
    return _relative(root, paths)


def _text_files(corpus: str, *, links: bool) -> list[SourceFile]:
    path = Path(corpus.removeprefix("text:")).expanduser()
    if path.is_file():
        return _relative(path.parent, _readable(corpus, [path]))
    if path.is_dir():
        paths = [entry for entry in path.rglob("*") if entry.is_file() and _has_known_suffix(entry)]
        paths = [entry for entry in paths if links or within(entry, path)]
        if not paths:
            raise UserError(f"data.corpus={corpus!r}: the folder holds no file with a suffix {_suffixes()}")
        return _relative(path, paths)
    if glob.has_magic(str(path)):
        return _glob_files(corpus, path)
    raise UserError(f"data.corpus={corpus!r}: no such file or folder")


def _glob_files(corpus: str, pattern: Path) -> list[SourceFile]:
    """Return the files that match; names are relative to the folder before the first wildcard."""
    fixed = next(index for index, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:fixed])
    paths = [path for path in root.glob("/".join(pattern.parts[fixed:])) if path.is_file()]
    if not paths:
        raise UserError(f"data.corpus={corpus!r}: no file matches the pattern")
    return _relative(root, _readable(corpus, paths))


def _readable(corpus: str, paths: list[Path]) -> list[Path]:
    """Return the paths with a known suffix, of which there must be one."""
    known = [path for path in paths if _has_known_suffix(path)]
    if not known:
        suffix = min(paths).suffix
        raise UserError(f"data.corpus={corpus!r}: unknown suffix {suffix!r}; must be {_suffixes()}")
    return known


def _has_known_suffix(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _relative(root: Path, paths: Iterable[Path]) -> list[SourceFile]:
    return [SourceFile(path, path.relative_to(root).as_posix()) for path in paths]
