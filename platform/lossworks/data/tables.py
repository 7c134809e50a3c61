"""Tables as people have them: columns of numbers, yes and no, dates and categories, some cells empty.

A table is read as texts. What a column holds is told by its cells, once, when a run begins; from then on the
run's columns hold, so that a table that is predicted on is read as the one that was trained on.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import numpy as np

from lossworks.data.text.encodings import OLD, encoding_of
from lossworks.errors import UserError, nearest, shortened
from lossworks.files import reading

Kind = Literal["number", "yes-no", "date", "category", "drop"]

_EMPTY = frozenset(("", "na", "n/a", "nan", "null", "none", "nil", "?", "-", "--", "missing", "#n/a", "nat"))
_YES = frozenset(("true", "yes", "y", "t", "on", "ja", "wahr", "oui", "si", "sí"))
_NO = frozenset(("false", "no", "n", "f", "off", "nein", "falsch", "non"))
_FEW = 20  # categories that any column may have
_MOST = 200  # that one with many rows may have
_ENOUGH = 1000  # cells that tell how a column's numbers are written
_EXPONENT = r"([eE][-+]?\d+)?"
_GERMAN = re.compile(r"[-+]?(\d+|[1-9]\d{0,2}(\.\d{3})+)?(,\d*)?" + _EXPONENT)
_ENGLISH = re.compile(r"[-+]?(\d+|[1-9]\d{0,2}(,\d{3})+)?(\.\d*)?" + _EXPONENT)
_DATES = ("%d.%m.%Y", "%d.%m.%Y %H:%M", "%d.%m.%Y %H:%M:%S", "%Y/%m/%d")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, eq=False)
class Cells:
    """A table as texts, without white space at their ends.

    Attributes:
        source: Its file, for messages.
        columns: Cells by column, N each.
        lines: The line of each row, for messages.
        commas: Whether the numbers of a column are written with a decimal comma, by column; those whose cells
            can be read either way are not named.
        notes: What was taken for granted in reading the file, or left out of it, in a sentence each.
    """

    source: str
    columns: Mapping[str, list[str]]
    lines: Sequence[int]
    commas: Mapping[str, bool] = field(default_factory=dict)
    notes: Sequence[str] = ()

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
        return _converted(self, name, _reader("number", self.comma_of(name)), "finite number")

    def comma_of(self, name: str, usual: bool | None = None) -> bool:
        """Return whether the numbers of a column are written with a decimal comma.

        What its own cells leave open is as usual, and if nothing is, as in the other columns, if these agree.
        """
        if name in self.commas:
            return self.commas[name]
        if usual is not None:
            return usual
        return bool(self.commas) and all(self.commas.values())


@dataclass(frozen=True)
class Column:
    """How a column of a table becomes features.

    Attributes:
        name: In the table's header.
        kind: ``number``, ``yes-no`` (1 and 0), ``date`` (days since 1970) or ``category`` (a feature each).
        categories: In their order, of that kind.
        gaps: Whether a further feature says that a cell was empty; what stands for it is the mean.
        comma: Whether its numbers had a decimal comma, which tells how to read those that can be read either
            way; None where that made no difference.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    gaps: bool = False
    comma: bool | None = None

    @classmethod
    def of_plain(cls, values: Mapping[str, Any]) -> Self:
        """Return what :meth:`plain` gave.

        Raises:
            UserError: It can't have given that.
        """
        name, kind, categories = (values.get(key) for key in ("name", "kind", "categories"))
        comma = values.get("comma")
        texts = isinstance(categories, list) and all(isinstance(one, str) for one in categories)
        if not (isinstance(name, str) and kind in get_args(Kind) and texts and comma in (None, True, False)):
            raise UserError(f"columns: {shortened(repr(dict(values)), 120)} describes no column of a table")
        return cls(name, cast("Kind", kind), tuple(categories or ()), bool(values.get("gaps")), comma)

    def plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        own = {"name": self.name, "kind": self.kind, "categories": list(self.categories), "gaps": self.gaps}
        return own if self.comma is None else own | {"comma": self.comma}

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
        empty = np.array([is_empty(text) for text in texts])
        if self.kind == "category":
            own = np.array([[text == value for value in self.categories] for text in texts], dtype=np.float64)
            own = own.reshape(len(texts), len(self.categories))
        else:
            read = _reader(self.kind, cells.comma_of(self.name, self.comma))
            own = _converted(cells, self.name, read, _NOUNS[self.kind])[:, None]
        return np.concatenate((own, empty[:, None].astype(np.float64)), axis=1) if self.gaps else own


@dataclass(frozen=True)
class Features:
    """All columns of a table that are features, in their order.

    Attributes:
        columns: How each is read.
        dropped: Names of those that are left out, with the reason.
        constant: Those of them that are the same in all rows here, and may be others elsewhere.
    """

    columns: tuple[Column, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)
    constant: tuple[Column, ...] = ()

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
        found, dropped, constant = [], {}, []
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
                    constant.append(column)
                else:
                    found.append(column)
        if not found:
            raise UserError(f"{cells.source}: has no feature beside {', '.join(others)}")
        return cls(tuple(found), dropped, tuple(constant))

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
        found = list(cells.notes)
        for column in self.columns:
            texts = cells.columns.get(column.name, [])
            if column.kind == "category":
                unknown = {text for text in texts if not is_empty(text)} - set(column.categories)
                if unknown:
                    some = ", ".join(sorted(unknown)[:3])
                    found.append(f"column {column.name}: {some}: no category of the model, counts as none")
            here = cells.commas.get(column.name)
            if column.kind == "number" and here is not None and column.comma is (not here):
                marks = ("comma", "point") if here else ("point", "comma")
                found.append(
                    f"column {column.name}: has a decimal {marks[0]}, and had a {marks[1]} in training"
                )
            if not column.gaps and any(map(is_empty, texts)):
                found.append(f"column {column.name}: has empty cells, unlike in training: the mean stands in")
        own = {column.name for column in self.columns}
        if others := [name for name in cells.columns if name not in own]:
            found.append(f"columns that the model doesn't read: {', '.join(others)}")
        return found


def read_cells(path: Path) -> Cells:
    """Return the table in a CSV or Parquet file as texts.

    Of a CSV file the encoding is told by its bytes, and whether commas, semicolons, tabs or bars part its
    cells by its header. A comma in a column's numbers is a decimal one where some cells can only be read so,
    and then points part thousands; the other way round where some can only be read with a decimal point. What
    a column leaves open is as in the others, and with semicolons and commas alone, decimal.

    Raises:
        UserError: It can't be read, has no rows, or a row has more or fewer cells than the header.
    """
    with reading(path):
        if path.suffix.lower() == ".parquet":
            return _of_parquet(path)
        return _of_csv(path)


def _of_csv(path: Path) -> Cells:
    # The reader's own treatment of line ends, since a quoted cell may hold one.
    encoding = encoding_of(path)
    text = path.read_bytes().decode(encoding, errors="replace")
    notes = ["it is no UTF-8 and read as Windows-1252"] if encoding == OLD else []
    said = re.match(r"sep=([,;\t|])\r?\n", text)  # a first line of Excel's
    delimiter = said[1] if said else _delimiter(text)
    text = text[said.end() :] if said else text
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    header = [name.strip() for name in next(reader, [])]
    # The reader's count of lines is right where cells span lines, and where lines are empty.
    above = 1 if said else 0
    every = [(reader.line_num + above, [cell.strip() for cell in row]) for row in reader]
    if not header:
        raise UserError(f"{path}: is empty; the first line names the columns")
    # Empty lines, and rows of empty cells at the end, as some programs write them, are no rows.
    last = max((at for at, (_, row) in enumerate(every) if any(row)), default=-1)
    rows = [(line, row) for line, row in every[: last + 1] if row]
    left = sorted({line for line, _ in every} - {line for line, _ in rows})
    if left:
        some = ", ".join(map(str, left[:3])) + (" and so on" if len(left) > 3 else "")
        notes.append(f"empty lines are left out: {some}")
    twice = sorted(name for name, count in Counter(header).items() if count > 1)
    if twice:
        raise UserError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
    if not rows:
        raise UserError(f"{path}: holds no rows below its header")
    for line, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {line}: holds {len(row)} cells for {len(header)} columns")
    columns = dict(zip(header, map(list, zip(*(row for _, row in rows), strict=True)), strict=True))
    told = {name: _comma(cells) for name, cells in columns.items()}
    commas = {name: comma for name, comma in told.items() if comma is not None}
    if not commas and delimiter == ";":
        commas = {name: True for name, cells in columns.items() if any("," in cell for cell in cells)}
    notes.extend(_ambiguous(columns, commas))
    return Cells(str(path), columns, [line for line, _ in rows], commas, notes)


def _ambiguous(columns: Mapping[str, list[str]], commas: Mapping[str, bool]) -> Iterator[str]:
    """Yield whose numbers could be written either way, and how they are read, unless another column tells."""
    for name, cells in columns.items() if not commas else ():
        example = next((cell for cell in cells if _is_number(cell, _GERMAN) and not cell.isdigit()), None)
        if example is not None and any(mark in example for mark in ".,"):
            value = _number(example, comma=False)
            yield f"column {name}: {example} is read as {value:g}, and could have the other decimal mark"


def _comma(cells: Sequence[str]) -> bool | None:
    """Return whether numbers have a decimal comma, by cells with one reading only; None without any.

    Of both kinds the more frequent one decides, and the others are no numbers.
    """
    german = english = 0
    for cell in cells:
        if german + english == _ENOUGH:
            break
        if "," in cell or "." in cell:
            one, other = (_is_number(cell, pattern) for pattern in (_GERMAN, _ENGLISH))
            german, english = german + (one and not other), english + (other and not one)
    return german > english if german or english else None


def _is_number(text: str, pattern: re.Pattern[str]) -> bool:
    return pattern.fullmatch(text) is not None and any(map(str.isdigit, text))


def _of_parquet(path: Path) -> Cells:
    from pyarrow import parquet

    table = parquet.read_table(path)
    if not table.num_rows:
        raise UserError(f"{path}: holds no rows")
    columns = {
        str(name).strip(): [_text(value) for value in table[name].to_pylist()] for name in table.column_names
    }
    if len(columns) < len(table.column_names):
        raise UserError(f"{path}: names a column more than once, but for white space")
    texts = {name for name, of in zip(columns, table.schema.types, strict=True) if _holds_texts(of)}
    told = {name: _comma(cells) if name in texts else False for name, cells in columns.items()}
    commas = {name: comma for name, comma in told.items() if comma is not None}
    return Cells(str(path), columns, range(1, table.num_rows + 1), commas)


def _holds_texts(of: Any) -> bool:
    """Return whether a column of that Arrow type holds texts, whose numbers somebody has written."""
    from pyarrow import types

    return any(test(of) for test in (types.is_string, types.is_large_string, types.is_dictionary))


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace").strip()
    if isinstance(value, datetime | date):
        return value.isoformat()
    return repr(value) if isinstance(value, float) else str(value).strip()


def _delimiter(text: str) -> str:
    """Return what parts the cells of a CSV file: what its header has most of, outside of quotes."""
    header = re.sub(r'"[^"]*"', "", text.lstrip("\n\r").partition("\n")[0])
    return max((",", ";", "\t", "|"), key=header.count)


def is_empty(text: str) -> bool:
    """Return whether a cell says that there is no value, as ``NA`` does."""
    return text.casefold() in _EMPTY


def _is_index(name: str, texts: Sequence[str]) -> bool:
    """Return whether a column without a name counts the rows, as some programs write it."""
    counts = ([str(row) for row in range(start, len(texts) + start)] for start in (0, 1))
    return name == "" and list(texts) in list(counts)


def _told(cells: Cells, name: str, texts: list[str], wanted: Kind | None) -> Column:
    """Return a column by what its cells hold, or as somebody has said."""
    known = [text for text in texts if not is_empty(text)]
    gaps = len(known) < len(texts)
    where = f"{cells.source}: column {name!r}"
    leave = f"leave it out with {_setting(name, 'drop')}"
    if not known:
        raise UserError(f"{where} is empty in every row; {leave}")
    if wanted is not None and wanted != "category":
        column = Column(name, wanted, gaps=gaps, comma=_used_comma(cells, name, wanted))
        try:
            column.encode(cells)
        except UserError as error:
            raise UserError(f"{error}, as {_setting(name, wanted)} says") from None
        return column
    distinct = sorted(set(known))
    words = {text.casefold() for text in distinct}
    if wanted is None:
        for kind in ("number", "yes-no", "date"):
            read = _reader(kind, cells.comma_of(name))
            values = {read(text) for text in distinct}
            # Of y and t alone, say, both would be yes, and what tells them apart would be lost.
            same = kind == "yes-no" and len(values) == 1 < len(words)
            if None not in values and not same:
                return Column(name, kind, gaps=gaps, comma=_used_comma(cells, name, kind))
        number = _reader("number", cells.comma_of(name))
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


def _used_comma(cells: Cells, name: str, kind: Kind) -> bool | None:
    """Return whether a column is read with decimal commas, None where no cell has a comma or a point."""
    marked = kind == "number" and any("," in text or "." in text for text in cells.columns[name])
    return cells.comma_of(name) if marked else None


def _number(text: str, *, comma: bool) -> float | None:
    """Return the finite number in a text, or None."""
    if not text.isascii() or not _is_number(text, _GERMAN if comma else _ENGLISH):
        return None
    plain = text.replace(".", "").replace(",", ".") if comma else text.replace(",", "")
    try:
        value = float(plain)
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
_NOUNS = {"number": "finite number", "yes-no": "yes or no", "date": "date"}


def _reader(kind: str, comma: bool) -> _Reader:
    """Return what reads a cell of a kind, to None where it is none; numbers with a decimal comma or point."""
    if kind == "number":
        return partial(_number, comma=comma)
    return _yes_no if kind == "yes-no" else _days


def _converted(cells: Cells, name: str, read: _Reader, noun: str) -> np.ndarray:
    """Return a column (N,), float64, NaN where it is empty."""
    texts = cells.columns[name]
    found = np.full(len(texts), np.nan)
    for row, text in enumerate(texts):
        if is_empty(text):
            continue
        value = read(text)
        if value is None:
            raise UserError(f"{cells.where(row, name)}: {shortened(text, 60)!r} is no {noun}")
        found[row] = value
    return found
