"""Files and folders that appear complete or not at all, whatever ends the process that writes them."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lossworks.errors import LossworksError, UserError, shortened


def write_atomically(path: Path, content: str | bytes, *, synced: bool = True) -> None:
    """Write a file; until all of it is on the disk, what was there before stays.

    Args:
        path: Its folder is there.
        content: Text is written as UTF-8.
        synced: Whether it must outlast a power cut, too, for which the disk is waited for; a file that need
            not may be empty after one, and whoever reads it must see that.
    """
    partial = hidden_beside(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``folder`` at the end, or vanishes on an error.

    Raises:
        UserError: At the end there is such a folder already, and it isn't empty.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(folder)
    temporary.mkdir()
    try:
        yield temporary
        _rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def hidden_beside(path: Path) -> Path:
    """Return a new hidden name in the same folder, so that a rename stays on one file system."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:  # someone else has filled the folder since it was looked at
        raise UserError(f"{folder}: can't be put in place: {error.strerror}") from None


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Turn whatever a reader raises on a damaged file into one sentence that names it.

    Readers of others, of images, archives or tables, raise what they like: errors of compression, of texts
    and of types. None of it is a mistake of ours, and none of it says which file it was.

    Raises:
        UserError: Naming ``what``.
    """
    try:
        yield
    except LossworksError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        named = reason if isinstance(error, OSError) and reason else f"{type(error).__name__}: {reason}"
        raise UserError(f"{what}: can't be read: {shortened(named, 300)}") from error


def within(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder once links are followed."""
    return path.resolve().is_relative_to(folder.resolve())
