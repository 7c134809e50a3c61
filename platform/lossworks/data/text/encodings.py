"""In which encoding a file of text is written: told by its first bytes, and by whether it is UTF-8 at all."""

import codecs
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from lossworks.errors import UserError

UTF8 = "utf-8"
OLD = "cp1252"
"""What a text that isn't UTF-8 is taken for: the most common of older encodings, which reads any byte."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BLOCK = 2**20
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, as `surrogateescape` gives them
_ZEROS = "holds zero bytes, which no text has; leave it out, or save it as UTF-8"


def encoding_of(path: Path) -> str:
    """Return the name of a file's encoding, as ``open`` takes it.

    A mark at the beginning tells it, and is no part of the text; UTF-16 without one is told by its zeros.
    What is no valid UTF-8 is taken for Windows-1252, unless most of what is beyond ASCII is UTF-8: then the
    rest of it is damage.

    Raises:
        UserError: The file holds bytes that no text has, or that its own encoding has not.
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        start = file.read(_BLOCK)
        for mark, name in _MARKS:
            if start.startswith(mark):
                return name
        if b"\0" in start:
            return _wide(path, start)
        return _narrow(path, itertools.chain([start], iter(lambda: file.read(_BLOCK), b"")))


def _narrow(path: Path, blocks: Iterable[bytes]) -> str:
    """Return UTF-8 or Windows-1252, by which of both more bytes beyond ASCII fit to."""
    decoder = codecs.getincrementaldecoder(UTF8)("surrogateescape")
    right = wrong = lines = 0
    first = ""
    for block in itertools.chain(blocks, [b""]):
        if b"\0" in block:
            raise UserError(f"{path}: {_ZEROS}")
        text = decoder.decode(block, final=not block)
        if not block.isascii() or not text.isascii():
            escaped = [found.start() for found in _ESCAPED.finditer(text)]
            if escaped and not wrong:
                line, byte = lines + text.count("\n", 0, escaped[0]) + 1, ord(text[escaped[0]]) - 0xDC00
                first = f"line {line} holds the byte 0x{byte:02x}"
            wrong += len(escaped)
            right += len(text) - len(text.encode("ascii", "ignore")) - len(escaped)
        lines += text.count("\n")
    if wrong and right >= wrong:
        raise UserError(f"{path}: {first}, which is no UTF-8, and the rest of the file is; mend it")
    return OLD if wrong else UTF8


def _wide(path: Path, start: bytes) -> str:
    """Return which UTF-16 a text with zeros is, from where they stand."""
    even, odd = start[::2].count(0), start[1::2].count(0)
    most = max(len(start) // 2, 1)
    if odd > 0.7 * most and even < 0.02 * most:
        return "utf-16-le"
    if even > 0.7 * most and odd < 0.02 * most:
        return "utf-16-be"
    raise UserError(f"{path}: {_ZEROS}")
