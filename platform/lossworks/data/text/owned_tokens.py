"""Whose the tokens of a corpus are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np

from lossworks.errors import UserError
from lossworks.files import reading

OWNERS_FILE = "owners.npz"


class OwnedTokens:
    """Runs of tokens one behind the other, of which each belongs to one owner.

    Attributes:
        names: Of the owners, in the order in which they appear.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._owner: list[int] = []
        self._end: list[int] = []
        self._by_owner: list[tuple[np.ndarray, np.ndarray]] | None = None

    def note(self, owner: str, tokens: int) -> None:
        """Take in that the tokens since the last call, up to the number ``tokens``, are an owner's."""
        number = self._numbers.setdefault(owner, len(self._numbers))
        if number == len(self.names):
            self.names.append(owner)
        if self._owner and self._owner[-1] == number:
            self._end[-1] = tokens
        else:
            self._owner.append(number)
            self._end.append(tokens)

    def write(self, folder: Path) -> None:
        """Write it into a folder of tokens."""
        arrays = {"names": np.array(self.names), "owner": np.array(self._owner), "end": np.array(self._end)}
        np.savez(folder / OWNERS_FILE, allow_pickle=False, **arrays)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what a folder of tokens says.

        Raises:
            UserError: It is damaged.
        """
        found = cls()
        path = folder / OWNERS_FILE
        try:
            with reading(path), np.load(path, allow_pickle=False) as arrays:
                found.names = arrays["names"].tolist()
                found._owner, found._end = arrays["owner"].tolist(), arrays["end"].tolist()
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: is damaged: {error}; prepare the data again") from None
        return found

    def sizes(self) -> list[int]:
        """Return how many tokens each owner has."""
        return [int(ends[-1]) for _, ends in self._runs()]

    def ranges(self, owner: int, first: int, count: int) -> Iterator[tuple[int, int]]:
        """Yield start and number of tokens of the runs that hold tokens of an owner.

        Args:
            owner: Its number.
            first: Place of the first among the owner's tokens.
            count: How many; fewer if the owner has no more.
        """
        starts, ends = self._runs()[owner]
        run = int(np.searchsorted(ends, first, side="right"))
        while count and run < len(starts):
            before = int(ends[run - 1]) if run else 0
            taken = min(count, int(ends[run]) - first)
            yield int(starts[run]) + first - before, taken
            first, count, run = first + taken, count - taken, run + 1

    def _runs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return of each owner the runs' first tokens, and how many tokens the owner has up to their ends."""
        if self._by_owner is None:
            owner, ends = np.array(self._owner, dtype=np.int64), np.array(self._end, dtype=np.int64)
            starts = np.concatenate(([0], ends[:-1]))
            own = [owner == number for number in range(len(self.names))]
            self._by_owner = [(starts[mask], (ends - starts)[mask].cumsum()) for mask in own]
        return self._by_owner
