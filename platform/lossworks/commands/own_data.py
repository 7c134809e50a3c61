"""The commands about a person's own files: what is read of them, and what a model says of them."""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.files import write_atomically

if TYPE_CHECKING:
    from lossworks.tasks.interface import Predictions


def _configure_data(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "What a column holds is told by its cells. Where that is wrong, a spec says it: "
        "data.columns.NAME=number, yes-no, date, category, or drop."
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="csv:PATH or parquet:PATH for a table; folder:PATH for images/ and masks/ of equal names",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as data.label=kind data.columns.zip=category"
    )


def _data(arguments: argparse.Namespace) -> int:
    kind, _, name = arguments.source.partition(":")
    show = {"csv": _show_table, "parquet": _show_table, "folder": _show_masks}.get(kind)
    if show is None or not name:
        raise UserError(
            f"{arguments.source}: give a table, csv:PATH or parquet:PATH, or images with masks, folder:PATH"
        )
    # Here as in a spec, where they are below data; errors name them as there.
    show(arguments.source, [override.removeprefix("data.") for override in arguments.overrides])
    return 0


def _show_masks(source: str, overrides: Sequence[str]) -> None:
    """Print what is read of a folder of images with masks: sizes, classes, and what is odd."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lossworks.data.images.census import count_masks
    from lossworks.data.images.mask_sources import read_masks
    from lossworks.specs import MasksSpec

    found = count_masks(read_masks(MasksSpec(source=source).override(overrides)))
    table = Table("class", "share of pixels", "images with it", box=None, header_style="bold")
    for name, share, images in found.classes:
        table.add_row(Text(name), f"{100 * share:.2f} %", str(images))
    console = Console()
    console.print(
        f"{source.partition(':')[2]}: {found.summary}", highlight=False, markup=False, soft_wrap=True
    )
    console.print(table)
    for note in found.notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)


def _show_table(source: str, overrides: Sequence[str]) -> None:
    """Print what is read of a table, column by column."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lossworks.data.example_sources import existing_file
    from lossworks.data.tables import Features, is_empty, read_cells
    from lossworks.specs import ExamplesSpec

    name = source.partition(":")[2]
    spec = ExamplesSpec(source=source).override(overrides)
    cells = read_cells(existing_file(name))
    others = [spec.label] if spec.label in cells.columns else []
    if not others and "label" in spec.model_fields_set:
        cells.column(spec.label, "data.label")  # which names the columns that there are
    features = Features.of(cells, [*others, *([spec.owner] if spec.owner else [])], spec.columns)
    read = {column.name: column for column in features.columns}
    names = ("column", "read as", "features", "empty", "different", "such as")
    table = Table(*names, box=None, header_style="bold")
    for title, texts in cells.columns.items():
        column = read.get(title)
        role = column.kind if column else "label" if title in others else features.dropped.get(title, "owner")
        known = [text for text in texts if not is_empty(text)]
        table.add_row(
            Text(title or "(no name)"),
            role if column or title in others else f"left out: {role}",
            str(len(column.features) if column else 0),
            str(len(texts) - len(known)),
            str(len(set(known))),
            Text(", ".join(list(dict.fromkeys(known))[:3])),
        )
    console = Console()
    console.print(f"{name}: {len(cells)} rows, {sum(len(c.features) for c in features.columns)} features")
    console.print(table)
    for note in cells.notes:
        console.print(note, style="yellow")
    unlabelled = cells.columns[spec.label].count("") if others else 0
    if unlabelled:
        console.print(
            f"{spec.label}: {unlabelled} rows have no label, and no training takes those: take them out, "
            "or fill the cells",
            style="yellow",
        )
    if not others:
        console.print(f"no column is called {spec.label}: say which is the label with data.label=COLUMN")


def _configure_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN|DIR", help="a run, or a folder that `lossworks export` made")
    parser.add_argument(
        "file",
        metavar="INPUT",
        help="a table as the model was trained on, npz, text, an image or a folder of them",
    )
    parser.add_argument(
        "--to", metavar="OUTPUT", help="CSV file to write, or a folder for masks; default: the terminal"
    )


def _predict(arguments: argparse.Namespace) -> int:
    from lossworks.training.weights.export import predict_file

    to = None if arguments.to is None else Path(arguments.to)
    if to is not None:
        _check_output(to, Path(arguments.file))
    found = predict_file(arguments.model, Path(arguments.file))
    for note in found.notes:
        print(f"lossworks: {note}", file=sys.stderr)
    # A column of the file that has a prediction's name keeps its own.
    own = {
        f"predicted {name}" if name in found.given else name: values for name, values in found.columns.items()
    }
    columns = {**found.given, **own}
    if to is None:
        _write(sys.stdout, columns)
        if found.files:
            print("lossworks: --to FOLDER writes the masks, too", file=sys.stderr)
        return 0
    if found.files:
        to = _write_files(to, found)
    text = io.StringIO(newline="")
    _write(text, columns)
    if to.exists() and not to.is_file():  # such as a pipe, in whose place no file may come
        to.write_text(text.getvalue(), encoding="utf-8", newline="")
    else:
        write_atomically(to, text.getvalue())
    print(f"{to}: {len(next(iter(columns.values()), []))} rows, {', '.join(list(own)[:4])}")
    return 0


def _write_files(to: Path, found: "Predictions") -> Path:
    """Write what belongs to a table beside it in a folder, and return the table's path there."""
    if to.exists() and not to.is_dir():
        raise UserError(f"--to {to}: is a file; what the model says are files of their own, so give a folder")
    for name, content in found.files.items():
        path = to / name
        if path.exists():
            raise UserError(f"{path}: is there already; give an empty folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content())
    return to / "predictions.csv"


def _check_output(to: Path, read: Path) -> None:
    if not to.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {to.parent}")
    if to.exists() and read.exists() and to.samefile(read):
        raise UserError(f"--to {to}: is the file that is read, which would be lost; give another name")


def _write(file: TextIO, columns: dict[str, Sequence[Any]]) -> None:
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])


DATA = Command(
    "show what is read of a table, column by column, or of images with masks",
    _configure_data,
    _data,
    group="your own data",
)
PREDICT = Command(
    "write what a trained model says of a file", _configure_predict, _predict, group="your own data"
)
