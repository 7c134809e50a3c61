"""Tables as people have them: columns of numbers, yes and no, dates and categories, some cells empty.

A table is read as texts. What a column holds is told by its cells, once, when a run begins; from then on the
run's columns hold, so that a table that is predicted on is read as the one that was trained on.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from lossworks.data.text.encodings import encoding_of
from lossworks.errors import UserError, nearest, shortened
from lossworks.files import reading

Kind = Literal["number", "yes-no", "date", "category", "drop"]

_EMPTY = frozenset(("", "na", "n/a", "nan", "null", "none", "nil", "?", "-", "--", "missing", "#n/a", "nat"))
_YES = frozenset(("true", "yes", "y", "t", "on", "ja", "wahr", "oui", "si", "sí"))
_NO = frozenset(("false", "no", "n", "f", "off", "nein", "falsch", "non"))
_FEW = 20  # categories that any column may have
_MOST = 200  # that one with many rows may have
_GERMAN = re.compile(r"[-+]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")
_ENGLISH = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d*)?")
_POINTED = re.compile(r"[-+]?(?!\d{1,3}(\.\d{3})+$)\d*\.\d+([eE][-+]?\d+)?")  # no mere thousands
_DATES = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%Y/%m/%d")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, eq=False)
class Cells:
    """A table as texts, without white space at their ends.

    Attributes:
        source: Its file, for messages.
        columns: Cells by column, N each.
        lines: The line of each row, for messages.
        commas: Columns whose numbers are written with a decimal comma.
    """

    source: str
    columns: Mapping[str, list[str]]
    lines: Sequence[int]
    commas: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.lines)

    def column(self, name: str, setting: str) -> list[str]:
        """Return the cells of a column.

        Raises:
            UserError: There is none of that name.
        """
        if name not in self.columns:
            guess = nearest(name, self.columns)
            hint = f"did you mean {guess}?" if guess else f"there are {', '.join(self.columns)}"
            raise UserError(f"{self.source}: {setting}={name} is no column; {hint}")
        return self.columns[name]

    def where(self, row: int, column: str) -> str:
        """Return where a cell stands, in words."""
        return f"{self.source}, line {self.lines[row]}, column {column}"

    def numbers(self, name: str) -> np.ndarray:
        """Return a column as numbers, float64 (N,), with NaN where a cell is empty.

        Raises:
            UserError: A cell is no finite number, naming where it stands.
        """
        return _converted(self, name, _READERS["number"](self, name), "finite number")


@dataclass(frozen=True)
class Column:
    """How a column of a table becomes features.

    Attributes:
        name: In the table's header.
        kind: ``number``, ``yes-no`` (1 and 0), ``date`` (days since 1970) or ``category`` (a feature each).
        categories: In their order, of that kind.
        gaps: Whether a further feature says that a cell was empty; what stands for it is the mean.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    gaps: bool = False

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return what :meth:`plain` gave."""
        return cls(values["name"], values["kind"], tuple(values["categories"]), bool(values["gaps"]))

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"name": self.name, "kind": self.kind, "categories": list(self.categories), "gaps": self.gaps}

    @property
    def features(self) -> list[str]:
        """Names of the features that it gives."""
        own = (
            [f"{self.name}={value}" for value in self.categories] if self.kind == "category" else [self.name]
        )
        return [*own, f"{self.name} is empty"] if self.gaps else own

    def encode(self, cells: Cells) -> np.ndarray:
        """Return the features (N, F), float64, with NaN for numbers that are missing.

        A category that was not there before is none of the known ones: all of its features are 0.

        Raises:
            UserError: A cell is none of the kind.
        """
        texts = cells.column(self.name, "column")
        empty = np.array([_is_empty(text) for text in texts])
        if self.kind == "category":
            own = np.array([[text == value for value in self.categories] for text in texts], dtype=np.float64)
            own = own.reshape(len(texts), len(self.categories))
        else:
            own = _converted(cells, self.name, _READERS[self.kind](cells, self.name), _NOUNS[self.kind])[
                :, None
            ]
        return np.concatenate((own, empty[:, None].astype(np.float64)), axis=1) if self.gaps else own


@dataclass(frozen=True)
class Features:
    """All columns of a table that are features, in their order.

    Attributes:
        columns: How each is read.
        dropped: Names of those that are left out, with the reason.
    """

    columns: tuple[Column, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Cells, others: Sequence[str], wanted: Mapping[str, Kind]) -> Self:
        """Return the columns of a table by what their cells hold.

        Args:
            cells: The table.
            others: Columns that are no features, such as the label's.
            wanted: Kinds of columns that somebody has said.

        Raises:
            UserError: A column can't be a feature, naming the way on; or there is none at all.
        """
        for name in wanted:
            cells.column(name, "data.columns")
        found, dropped = [], {}
        for name, texts in cells.columns.items():
            if name in others:
                continue
            if wanted.get(name) == "drop":
                dropped[name] = "asked for"
            elif name not in wanted and _is_index(name, texts):
                dropped[name] = "counts the rows"
            else:
                column = _told(cells, name, texts, wanted.get(name))
                if name not in wanted and len(column.categories) == 1 and not column.gaps:
                    dropped[name] = "is the same in all rows"
                else:
                    found.append(column)
        if not found:
            raise UserError(f"{cells.source}: has no feature beside {', '.join(others)}")
        return cls(tuple(found), dropped)

    @classmethod
    def of_plain(cls, values: Sequence[Mapping[str, Any]]) -> Self:
        """Return what :meth:`plain` gave."""
        return cls(tuple(Column.of_plain(one) for one in values))

    def plain(self) -> list[dict[str, Any]]:
        """Return the columns as plain data."""
        return [column.plain() for column in self.columns]

    def encode(self, cells: Cells) -> np.ndarray:
        """Return the features (N, F), float64, with NaN for numbers that are missing.

        Raises:
            UserError: A column is missing, or a cell is none of its kind.
        """
        missing = [column.name for column in self.columns if column.name not in cells.columns]
        if missing:
            alike = {name.casefold(): name for name in cells.columns}
            guess = alike.get(missing[0].casefold()) or nearest(missing[0], cells.columns)
            hint = f"; is {guess} the column {missing[0]}?" if guess else ""
            raise UserError(
                f"{cells.source}: lacks the columns {', '.join(missing)}, which the model reads{hint}"
            )
        return np.concatenate([column.encode(cells) for column in self.columns], axis=1)

    def surprises(self, cells: Cells) -> list[str]:
        """Return what a table holds that these columns have not seen, in a sentence each."""
        found = []
        for column in self.columns:
            texts = cells.columns.get(column.name, [])
            if column.kind == "category":
                unknown = {text for text in texts if not _is_empty(text)} - set(column.categories)
                if unknown:
                    some = ", ".join(sorted(unknown)[:3])
                    found.append(f"column {column.name}: {some}: no category of the model, counts as none")
            if not column.gaps and any(map(_is_empty, texts)):
                found.append(f"column {column.name}: has empty cells, unlike in training: the mean stands in")
        own = {column.name for column in self.columns}
        if others := [name for name in cells.columns if name not in own]:
            found.append(f"columns that the model doesn't read: {', '.join(others)}")
        return found


def read_cells(path: Path) -> Cells:
    """Return the table in a CSV or Parquet file as texts.

    Of a CSV file the encoding is told by its bytes, and whether commas, semicolons, tabs or bars part its
    cells by its header. A comma in numbers is a decimal one behind semicolons, and else in columns where some
    cells can only be read so and none has a decimal point.

    Raises:
        UserError: It can't be read, has no rows, or a row has more or fewer cells than the header.
    """
    with reading(path):
        if path.suffix.lower() == ".parquet":
            return _of_parquet(path)
        return _of_csv(path)


def _of_csv(path: Path) -> Cells:
    # The reader's own treatment of line ends, since a quoted cell may hold one.
    text = path.read_bytes().decode(encoding_of(path), errors="replace")
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    # The reader's count of lines is right where cells span lines, and where lines are empty.
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    if not header:
        raise UserError(f"{path}: is empty; the first line names the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
    if not rows:
        raise UserError(f"{path}: holds no rows below its header")
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: holds {len(row)} cells for {len(header)} columns")
    columns = {name: [row[at] for _, row in rows] for at, name in enumerate(header)}
    commas = [name for name, cells in columns.items() if delimiter == ";" or _has_decimal_commas(cells)]
    return Cells(str(path), columns, [line for line, _ in rows], frozenset(commas))


def _has_decimal_commas(cells: Sequence[str]) -> bool:
    """Return whether some cells can only be numbers with a decimal comma, and none is one with a point."""
    commas = any(_GERMAN.fullmatch(cell) and not _ENGLISH.fullmatch(cell) for cell in cells if "," in cell)
    return commas and not any(_POINTED.fullmatch(cell) for cell in cells)


def _of_parquet(path: Path) -> Cells:
    from pyarrow import parquet

    table = parquet.read_table(path)
    if not table.num_rows:
        raise UserError(f"{path}: holds no rows")
    columns = {str(name): [_text(value) for value in table[name].to_pylist()] for name in table.column_names}
    return Cells(str(path), columns, range(1, table.num_rows + 1))


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").strip()
    if isinstance(value, datetime | date):
        return value.isoformat()
    return repr(value) if isinstance(value, float) else str(value).strip()


def _delimiter(text: str) -> str:
    """Return what parts the cells of a CSV file: what its header has most of, outside of quotes."""
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n\r").partition("\n")[0])
    return max((",", ";", "\t", "|"), key=header.count)


def _is_empty(text: str) -> bool:
    return text.casefold() in _EMPTY


def _is_index(name: str, texts: Sequence[str]) -> bool:
    """Return whether a column without a name counts the rows, as some programs write it."""
    counts = ([str(row) for row in range(start, len(texts) + start)] for start in (0, 1))
    return name == "" and list(texts) in list(counts)


def _told(cells: Cells, name: str, texts: list[str], wanted: Kind | None) -> Column:
    """Return a column by what its cells hold, or as somebody has said."""
    known = [text for text in texts if not _is_empty(text)]
    gaps = len(known) < len(texts)
    where = f"{cells.source}: column {name!r}"
    leave = f"leave it out with {_setting(name, 'drop')}"
    if not known:
        raise UserError(f"{where} is empty in every row; {leave}")
    if wanted is not None and wanted != "category":
        column = Column(name, wanted, gaps=gaps)
        try:
            column.encode(cells)
        except UserError as error:
            raise UserError(f"{error}, as {_setting(name, wanted)} says") from None
        return column
    distinct = sorted(set(known))
    if wanted is None:
        for kind in ("number", "yes-no", "date"):
            read = _READERS[kind](cells, name)
            if all(read(text) is not None for text in distinct):
                return Column(name, kind, gaps=gaps)
        number = _READERS["number"](cells, name)
        odd = [text for text in distinct if number(text) is None]
        if len(odd) <= max(1, 0.1 * len(distinct)) and len(odd) < len(distinct):
            row = texts.index(odd[0])
            raise UserError(
                f"{cells.where(row, name)}: {shortened(odd[0], 60)!r} is no finite number, and nearly all "
                f"others of the column are; mend it, or {leave}"
            )
        if len(distinct) > max(_FEW, min(_MOST, len(texts) // 10)):
            raise UserError(
                f"{where} holds {len(distinct)} different texts in {len(texts)} rows, such as "
                f"{shortened(distinct[0], 60)!r}: neither numbers nor a few categories; {leave}, or take "
                f"each text for a category with {_setting(name, 'category')}"
            )
    return Column(name, "category", tuple(distinct), gaps)


def _setting(name: str, kind: str) -> str:
    """Return what a person writes to say what a column holds."""
    plain = re.fullmatch(r"[\w-]+", name)
    return f"data.columns.{name}={kind}" if plain else f"'data.columns={{{json.dumps(name)}: {kind}}}'"


def _number(text: str, *, comma: bool) -> float | None:
    """Return the finite number in a text, or None."""
    if not text.isascii() or "_" in text:
        return None
    if comma and _GERMAN.fullmatch(text):
        text = text.replace(".", "").replace(",", ".") if "," in text else text
    elif not comma and _ENGLISH.fullmatch(text):
        text = text.replace(",", "")
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _yes_no(text: str) -> float | None:
    word = text.casefold()
    return 1.0 if word in _YES else 0.0 if word in _NO else None


def _days(text: str) -> float | None:
    """Return the days since 1970 of a date or time, or None; a time without a zone is taken for UTC."""
    try:
        found = datetime.fromisoformat(text) if not text.isdigit() else None
    except ValueError:
        found = None
    for form in _DATES if found is None else ():
        try:
            found = datetime.strptime(text, form).replace(tzinfo=UTC)
            break
        except ValueError:
            continue
    if found is None:
        return None
    return ((found if found.tzinfo else found.replace(tzinfo=UTC)) - _EPOCH).total_seconds() / 86400


_Reader = Callable[[str], float | None]
_READERS: dict[str, Callable[[Cells, str], _Reader]] = {
    "number": lambda cells, name: lambda text: _number(text, comma=name in cells.commas),
    "yes-no": lambda *_: _yes_no,
    "date": lambda *_: _days,
}
_NOUNS = {"number": "finite number", "yes-no": "yes or no", "date": "date"}


def _converted(cells: Cells, name: str, read: _Reader, noun: str) -> np.ndarray:
    """Return a column (N,), float64, NaN where it is empty."""
    texts = cells.columns[name]
    found = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        if _is_empty(text):
            continue
        value = read(text)
        if value is None:
            raise UserError(f"{cells.where(row, name)}: {shortened(text, 60)!r} is no {noun}")
        found[row] = value
    return found
