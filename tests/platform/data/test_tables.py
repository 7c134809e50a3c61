"""Tables as people have them: what is told of columns, what is refused, and encodings, parts and gaps."""

import csv
import json
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from lossworks.data import load_examples
from lossworks.data.learnt import Learnt
from lossworks.data.tables import Features, read_cells
from lossworks.data.values import load_values
from lossworks.errors import UserError
from lossworks.specs import ExamplesSpec
from lossworks.specs.tasks.values import ValuesSpec

MESSY = """Größe;Gewicht;Raucher;Geboren;Stadt;Punkte;Art
1,72;70,5;ja;03.05.1990;Köln;1.234,5;Katze
1,80;;nein;12.11.1985;Bonn;980,0;Hund
1,65;55,25;nein;01.01.2000;Köln;1.001,0;Katze
1,91;88,0;ja;30.06.1978;;870,0;Hund
1,75;71,0;ja;15.03.1992;Aachen;910,0;Katze
1,70;64,0;nein;22.07.1988;Bonn;905,5;Hund
"""


def written(tmp_path, content, name="table.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return path


def told(path, *others, **wanted):
    cells = read_cells(path)
    return Features.of(cells, others, wanted), cells


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-le", "utf-32"])
def test_a_german_table_is_read(encoding, tmp_path):
    """Semicolons, decimal commas, points for thousands, dates, yes and no, gaps; whatever the encoding."""
    found, cells = told(written(tmp_path, MESSY, encoding=encoding), "Art")
    kinds = {column.name: (column.kind, column.gaps) for column in found.columns}
    features = dict(zip([f for c in found.columns for f in c.features], found.encode(cells).T, strict=True))

    assert kinds == {
        "Größe": ("number", False),
        "Gewicht": ("number", True),
        "Raucher": ("yes-no", False),
        "Geboren": ("date", False),
        "Stadt": ("category", True),
        "Punkte": ("number", False),
    }
    assert features["Größe"][:2].tolist() == [1.72, 1.80]
    assert features["Punkte"][0] == 1234.5
    assert np.isnan(features["Gewicht"][1])
    assert features["Gewicht is empty"].tolist() == [0, 1, 0, 0, 0, 0]
    assert features["Raucher"].tolist() == [1, 0, 0, 1, 1, 0]
    assert features["Geboren"][2] == 10957  # days from 1970 to 2000
    assert features["Stadt=Köln"].tolist() == [1, 0, 1, 0, 0, 0]
    assert [features[f"Stadt={name}"][3] for name in ("Aachen", "Bonn", "Köln")] == [0, 0, 0]


def rows(change=lambda text: text):
    return "u,v,label\n" + change("".join(f"{i}.5,{-i},{'ab'[i % 2]}\n" for i in range(12)))


@pytest.mark.parametrize(
    "content",
    [
        rows(),
        rows().replace("\n", "\r\n").encode("utf-8-sig"),
        rows().replace(",", "\t"),
        rows().replace(",", "|"),
        rows().replace(",", ", "),
        rows().rstrip(),
        rows().replace("u,v,label\n", "u,v,label\n\n") + "\n   \n",
        rows(lambda text: text.replace("b", "b ")),
        rows().encode("utf-16"),
        ",u,v,label\n" + "".join(f"{i},{row}\n" for i, row in enumerate(rows().splitlines()[1:])),
    ],
    ids=["plain", "bom-crlf", "tabs", "bars", "spaces", "no-end", "blank-lines", "ends", "utf-16", "index"],
)
def test_forms_of_one_table_are_one_table(content, tmp_path):
    spec = ExamplesSpec(source=f"csv:{written(tmp_path, content)}", standardise=False)
    data = load_examples(spec, 0)
    whole = np.concatenate([data.train.inputs.numpy(), data.held_out.inputs.numpy()])

    assert data.names == ("a", "b")
    assert sorted(whole[:, 0].tolist()) == [i + 0.5 for i in range(12)]
    assert data.shape == (2,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; the first line names the columns"),
        ("u,v,label\n", "holds no rows below its header"),
        ("u,u,label\n1,2,a\n", "the header names 'u' more than once"),
        ("label\na\nb\n", "has no feature beside label"),
        ("u,label\n1,a\n2,b,3\n", "line 3: holds 3 cells for 2 columns"),
        ("u,kind\n1,a\n2,b\n", "data.label=label is no column; there are u, kind"),
        ("u,lable\n1,a\n2,b\n", "data.label=label is no column; did you mean lable"),
        ("u,label\n1,a\n2,\n", "line 3, column label: is empty"),
        (rows(lambda text: text.replace("3.5", "1e400")), "line 5, column u: '1e400' is no finite number"),
        (rows(lambda text: text.replace("3.5", "1_000")), "'1_000' is no finite number"),
        (rows(lambda text: text.replace("3.5", "٣.٥")), "is no finite number"),
        (rows(lambda text: text.replace("\n", "").replace("b", "a\n")) + "\0", "holds zero bytes"),
        ("u,label\n" + "1," + "x" * 200_000 + "\n2,b\n", "can't be read"),
        (
            "u,e,label\n" + "1,,a\n2,,b\n" * 4,
            "column 'e' is empty in every row; leave it out with data.",
        ),
        (
            "name,label\n" + "".join(f"person {i},{'ab'[i % 2]}\n" for i in range(40)),
            "column 'name' holds 40 different texts in 40 rows, such as 'person 0': neither numbers nor",
        ),
    ],
)
def test_what_is_no_table_is_refused_with_the_way_on(content, message, tmp_path):
    with pytest.raises(UserError) as refused:
        load_examples(ExamplesSpec(source=f"csv:{written(tmp_path, content)}"), 0)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500


def test_somebody_may_say_what_a_column_holds(tmp_path):
    """A postal code is a category, and a name is left out."""
    text = "zip,name,label\n" + "".join(f"{50 + i % 3},person {i},{'ab'[i % 2]}\n" for i in range(40))
    path = written(tmp_path, text)
    spec = ExamplesSpec(source=f"csv:{path}", columns={"zip": "category", "name": "drop"})
    data = load_examples(spec, 0)

    assert [column["categories"] for column in data.learnt.facts["columns"]] == [["50", "51", "52"]]
    assert data.shape == (3,)
    with pytest.raises(UserError, match=r"data.columns=nome is no column; did you mean name"):
        told(path, "label", nome="drop")
    with pytest.raises(UserError, match="line 2, column name: 'person 0' is no finite number"):
        told(path, "label", name="number")


def test_classes_that_are_numbers_are_in_their_order(tmp_path):
    text = "u,label\n" + "".join(f"{i},{i % 12}\n" for i in range(48))
    found = load_examples(ExamplesSpec(source=f"csv:{written(tmp_path, text)}"), 0).names
    assert found == tuple(str(number) for number in range(12))


def test_a_parquet_table_is_the_same_table(tmp_path):
    """With its own types: numbers, booleans, dates, dictionaries and nulls."""
    days = [date(2000, 1, 1 + i % 9) for i in range(12)]
    table = pa.table(
        {
            "n": pa.array([None if i == 3 else i + 0.25 for i in range(12)]),
            "b": pa.array([i % 3 == 0 for i in range(12)]),
            "d": pa.array(days),
            "c": pa.array(["xyz"[i % 3] for i in range(12)]).dictionary_encode(),
            "label": pa.array(["ab"[i % 2] for i in range(12)]),
        }
    )
    parquet.write_table(table, tmp_path / "t.parquet")
    found, cells = told(tmp_path / "t.parquet", "label")

    assert [column.kind for column in found.columns] == ["number", "yes-no", "date", "category"]
    assert found.encode(cells)[0].tolist() == [0.25, 0, 1, 10957, 1, 0, 0]
    data = load_examples(ExamplesSpec(source=f"parquet:{tmp_path / 't.parquet'}"), 0)
    assert data.shape == (7,)
    assert data.train.inputs.isfinite().all()


def test_what_was_told_at_first_holds(tmp_path):
    """A table that is read for a model has that one's columns; unknown categories are none."""
    first, cells = told(written(tmp_path, MESSY), "Art")
    other = written(
        tmp_path,
        "Stadt;Punkte;Geboren;Raucher;Gewicht;Größe;Neu\nUlm;1;1.1.2000;nein;;1,5;x\nBonn;;2.1.2000;ja;60;1,7;y\n",
        "other.csv",
    )
    known = Features.of_plain(first.plain())
    found = known.encode(read_cells(other))

    assert known == Features(first.columns)
    assert found.shape == (2, known.encode(cells).shape[1])
    assert found[0, 0] == 1.5
    notes = known.surprises(read_cells(other))
    assert any("column Stadt: Ulm: no category of the model" in note for note in notes)
    assert any("column Punkte: has empty cells, unlike in training" in note for note in notes)
    assert any("columns that the model doesn't read: Neu" in note for note in notes)
    with pytest.raises(UserError, match="lacks the columns Größe, Gewicht"):
        known.encode(read_cells(written(tmp_path, "Stadt;Punkte\nUlm;1\n", "few.csv")))


def test_gaps_stand_at_the_mean_and_need_a_scale(tmp_path):
    text = "u,y\n" + "".join(f"{'' if i % 5 == 0 else i},{i}\n" for i in range(40))
    path = written(tmp_path, text)
    data = load_values(ValuesSpec(source=f"csv:{path}", label="y"), 0)
    empty = data.train.inputs[:, 1] > 0

    assert empty.any()
    assert (data.train.inputs[empty][:, 0] == 0).all()
    assert data.train.inputs.isfinite().all()
    with pytest.raises(UserError, match=r"data.standardise=false: cells are empty"):
        load_values(ValuesSpec(source=f"csv:{path}", label="y", standardise=False), 0)
    with pytest.raises(UserError, match=r"line 2, column u: is empty"):
        load_values(ValuesSpec(source=f"csv:{path}", label="u"), 0)


@pytest.mark.parametrize("value", [14.62, 100.0, 0.1, 1e-3, 1234.567])
def test_a_constant_column_is_only_shifted(value, tmp_path):
    """Rounding gives it a deviation of 4e-15, by which an input that differs by 1e-7 would be torn away."""
    text = "u,v,label\n" + "".join(f"{value},{i},{'ab'[i % 2]}\n" for i in range(1000))
    facts = load_examples(ExamplesSpec(source=f"csv:{written(tmp_path, text)}"), 0).learnt.facts
    scale = Learnt(facts).facts["standardisation"]

    assert scale["deviation"][0] == 1
    assert scale["mean"][0] == pytest.approx(value)


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|"])
def test_decimal_commas_are_read_whatever_parts_the_cells(delimiter, tmp_path):
    """As a spreadsheet writes them, quoted where it must, and with points between thousands."""
    file = tmp_path / "t.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened, delimiter=delimiter)
        writer.writerow(["a", "b", "c", "day"])
        writer.writerow(["1,5", "1.234,25", "0.5", "01.02.2020"])
        writer.writerow(["-2,25", "17", "0.25", "02.02.2020"])
    cells = read_cells(file)

    assert cells.numbers("a").tolist() == [1.5, -2.25]
    assert cells.numbers("b").tolist() == [1234.25, 17.0]
    assert cells.numbers("c").tolist() == [0.5, 0.25]


def test_commas_between_thousands_stay_what_they_are(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text('a,b\n"1,234.5",0.5\n"12,345",1.25\n')
    assert read_cells(file).numbers("a").tolist() == [1234.5, 12345.0]
    file.write_text('a,b\n"1,234",0.5\n"12,345",1.25\n')
    assert read_cells(file).numbers("a").tolist() == [1234.0, 12345.0]


def test_a_category_that_never_changes_is_left_out(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("size,currency,label\n1,EUR,a\n2,EUR,b\n")
    features = Features.of(read_cells(file), ["label"], {})

    assert [column.name for column in features.columns] == ["size"]
    assert features.dropped == {"currency": "is the same in all rows"}
    wanted = Features.of(read_cells(file), ["label"], {"currency": "category"})
    assert [column.name for column in wanted.columns] == ["size", "currency"]


def test_a_kind_that_a_column_has_not_is_named(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("day,label\n01.02.2020,a\n02.02.2020,b\n")
    with pytest.raises(UserError, match=r"is no finite number, as data\.columns\.day=number says"):
        Features.of(read_cells(file), ["label"], {"day": "number"})


def test_a_column_that_is_missing_has_the_nearest_named(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("Size,weight,label\n1,2,a\n2,3,b\n")
    features = Features.of(read_cells(file), ["label"], {})
    file.write_text("SIZE,weight\n1,2\n")
    with pytest.raises(UserError, match=r"lacks the columns Size, which the model reads; is SIZE the column"):
        features.encode(read_cells(file))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("v;label\n1.234,50;a\n1.234;b\n12,5;a\n", [1234.5, 1234, 12.5]),
        ("v;label\n1,234;a\n999.5;b\n12.25;a\n", [1234, 999.5, 12.25]),
        ("v;w;label\n1.234;0,5;a\n12.345;1,5;b\n7;2,5;a\n", [1234, 12345, 7]),
        ("v;label\n0.123;a\n12.345;b\n", [0.123, 12.345]),
        ("v;label\n1.234;a\n12.345;b\n", [1.234, 12.345]),
        ('v,label\n"1,5e3",a\n-2e-1,b\n', [1500, -0.2]),
        ("sep=;\nv;label\n1,5;a\n2;b\n", [1.5, 2]),
    ],
)
def test_the_decimal_mark_of_a_column_is_told_by_all_its_cells(text, numbers, tmp_path):
    """Points part thousands where other cells have decimal commas, and the other way round."""
    file = tmp_path / "t.csv"
    file.write_text(text)
    cells = read_cells(file)

    assert Features.of(cells, ["label"], {}).encode(cells)[:, 0].tolist() == numbers


def test_what_could_be_read_either_way_is_said(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("v;label\n1.234;a\n12.345;b\n")

    assert read_cells(file).notes == [
        "column v: 1.234 is read as 1.234, and could have the other decimal mark"
    ]


def test_the_decimal_mark_is_the_models_where_a_cell_leaves_it_open(tmp_path):
    """A later table is read as the first one was; what can only be read otherwise is said."""
    file = tmp_path / "t.csv"
    file.write_text('v,label\n"1,5",a\n"2,25",b\n')
    cells = read_cells(file)
    model = Features.of_plain(json.loads(json.dumps(Features.of(cells, ["label"], {}).plain())))

    file.write_text('v\n"1,234"\n')
    assert model.encode(read_cells(file)).tolist() == [[1.234]]
    file.write_text("v\n1.9\n1.234\n")
    cells = read_cells(file)
    assert model.encode(cells).tolist() == [[1.9], [1.234]]
    assert model.surprises(cells) == ["column v: has a decimal point, and had a comma in training"]


def test_a_row_of_empty_cells_is_a_row(tmp_path):
    """But not at the end of a file, where some programs write many of them; what is left out is said."""
    file = tmp_path / "t.csv"
    file.write_text("v,w,label\n1,x,a\n,,\n\n2,y,b\n,,\n,,\n")
    cells = read_cells(file)

    assert list(cells.lines) == [2, 3, 5]
    assert cells.columns["v"] == ["1", "", "2"]
    assert cells.notes == ["empty lines are left out: 4, 6, 7"]


def test_a_byte_that_is_no_text_is_named(tmp_path):
    """Not the whole file read in another encoding, which would change every name in it."""
    file = tmp_path / "t.csv"
    file.write_bytes("größe,label\nüber,a\nä".encode() + b"\xff,b\n")
    with pytest.raises(
        UserError, match="line 3 holds the byte 0xff, which is no UTF-8, and the rest of the file"
    ):
        read_cells(file)
    file.write_bytes("größe,label\nüber,a\nä,b\n".encode("cp1252"))
    cells = read_cells(file)
    assert (list(cells.columns), cells.notes) == (
        ["größe", "label"],
        ["it is no UTF-8 and read as Windows-1252"],
    )


def test_words_that_mean_the_same_are_categories_where_nothing_means_the_other(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("v,label\ny,a\nt,b\n")
    cells = read_cells(file)

    assert Features.of(cells, ["label"], {}).columns[0].categories == ("t", "y")


def test_columns_that_are_damaged_are_named():
    with pytest.raises(UserError, match=r"'kind': 'nummer'.* describes no column of a table"):
        Features.of_plain([{"name": "v", "kind": "nummer", "categories": [], "gaps": False}])
