"""Prompts and answers that need no file: docstrings of the interpreter's own sources."""

import ast
import warnings
from collections.abc import Iterator

from lossworks.data.answers.examples import AnswerRecord, answered
from lossworks.data.text.corpus_files import corpus_files
from lossworks.specs import DataSpec

_LIMIT = 2000  # docstrings; so many are read in seconds
_CHARACTERS = range(20, 161)  # of a docstring's first line


def docstring_pairs() -> list[AnswerRecord]:
    """Return a function's signature as prompt and its docstring's first line as answer, of the library.

    No docstring comes twice. The order is random, but the same on every machine with the same sources.
    """
    return [AnswerRecord(place, (answered(prompt, answer),)) for place, prompt, answer in _docstrings()]


def function_names() -> list[AnswerRecord]:
    """Return a docstring's first line as prompt and its function's name as answer, of the library.

    A name is a few tokens, of which several may be right, so that it matters how many one may try.
    """
    found = []
    for place, prompt, answer in _docstrings():
        name = prompt.removeprefix("def ").partition("(")[0]
        found.append(AnswerRecord(place, (answered(f'"""{answer}\ndef ', f"{name}("),)))
    return found


def wrong_docstrings() -> list[AnswerRecord]:
    """Return signatures with their own docstring, which is chosen, and with another one's, rejected.

    Neighbours exchange theirs. So every docstring is chosen as often as it is rejected, and one that is held
    out is not rejected in training: nothing but the signature tells which one is right.
    """
    found = list(_docstrings())
    found = found[: len(found) // 2 * 2]
    return [
        AnswerRecord(place, (answered(prompt, answer), answered(prompt, found[index ^ 1][2])))
        for index, (place, prompt, answer) in enumerate(found)
    ]


def _docstrings() -> Iterator[tuple[str, str, str]]:
    """Yield where a function stands, its signature up to the docstring, and that one's first line."""
    seen: set[str] = set()
    for file in corpus_files(DataSpec(corpus="stdlib")):
        if "test" in file.name or len(seen) >= _LIMIT:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the library's own old spellings
                tree = ast.parse(file.path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # the library holds files that are wrong on purpose
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            line = (ast.get_docstring(node) or "").split("\n")[0].strip()
            if len(line) in _CHARACTERS and line not in seen and len(seen) < _LIMIT:
                seen.add(line)
                prompt = f'def {node.name}({ast.unparse(node.args)}):\n    """'
                yield f"{file.name}, line {node.lineno}", prompt, f'{line}"""'
