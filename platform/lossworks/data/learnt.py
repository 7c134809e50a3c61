"""What a run learns from its data besides weights: names of classes, scales, a tokenizer.

A model is worth nothing without them, and data change. So a run keeps them when it begins; going on with it,
exporting it and evaluating it read what was kept, and never make it again from the data of the day.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from lossworks.errors import UserError
from lossworks.files import appearing

_FACTS = "learnt.json"


@dataclass(frozen=True, eq=False)
class Learnt:
    """What a task has learnt from data and its model needs ever after.

    Attributes:
        facts: Plain data by name, such as ``classes`` and ``standardisation``; what an exported model's
            configuration holds as well.
        files: By name, such as ``tokenizer.json``.
        digest: Of the data; empty where they are drawn or come with a library.
        source: Whose it is, for messages, such as ``run 0123``.
    """

    facts: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    digest: str = ""
    source: str = ""

    def write(self, folder: Path) -> None:
        """Keep it in a folder, which appears complete or not at all."""
        with appearing(folder) as temporary:
            for name, file in self.files.items():
                shutil.copyfile(file, temporary / name)
            values = {"facts": dict(self.facts), "files": sorted(self.files), "digest": self.digest}
            (temporary / _FACTS).write_text(json.dumps(values, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, source: str) -> Self | None:
        """Return what a folder keeps, or None if there is no such folder.

        Raises:
            UserError: It is damaged.
        """
        if not folder.exists():
            return None
        try:
            values = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            files = {str(name): folder / str(name) for name in values["files"]}
            facts, digest = dict(values["facts"]), str(values["digest"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / _FACTS}: is damaged: {type(error).__name__}: {error}") from None
        for file in files.values():
            if not file.is_file():
                raise UserError(f"{file}: is missing, and {source} can't do without it")
        return cls(facts, files, digest, source)

    def fact(self, name: str) -> Any:
        """Return what is known by a name.

        Raises:
            UserError: Nothing is, as in a damaged folder.
        """
        if name not in self.facts:
            raise UserError(f"{self.source}: lacks {name}, which a trained model of this task has")
        return self.facts[name]

    def of(self, source: str) -> "Learnt":
        """Return the same as somebody else's."""
        return replace(self, source=source)

    def require_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse examples of another shape.

        Raises:
            UserError: With both shapes.
        """
        own = tuple(self.fact("shape"))
        if own != shape:
            raise UserError(f"data.source: examples are {shape}; those of {self.source} are {own}")

    def numbers_of(self, names: tuple[str, ...], what: str) -> np.ndarray:
        """Return which number each of today's classes or labels had, int64 (K,).

        Args:
            names: Today's.
            what: What a message calls one of them.

        Raises:
            UserError: One of them was not there.
        """
        own = {str(name): number for number, name in enumerate(self.fact(what))}
        for name in names:
            if name not in own:
                there = ", ".join(list(own)[:20])
                raise UserError(
                    f"data.source: {name!r} is none of the {what} of {self.source}, which are {there}"
                )
        return np.array([own[name] for name in names], dtype=np.int64)


def digest_of(*parts: np.ndarray | tuple[str, ...] | None) -> str:
    """Return a digest of arrays and names, 32 hexadecimal digits."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype.str}{part.shape}".encode())
            found.update(np.ascontiguousarray(part).tobytes())
        else:
            found.update(json.dumps(part).encode())
    return found.hexdigest()[:32]
