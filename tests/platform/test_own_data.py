"""A person's own table, from its cells to predictions: by the commands, from a folder with odd names."""

import csv
import random

import numpy as np
import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.cli import main
from lossworks_testing.classification import tiny
from lossworks_testing.training import prepared, run_in_folder, tiny_spec


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    odd = tmp_path / "my data #1"
    odd.mkdir()
    monkeypatch.chdir(odd)
    return odd


def write_messy(path, rows=200):
    """Write semicolons, German decimals, gaps, string labels, a column to leave out; in Windows-1252."""
    draw = random.Random(0)
    lines = ["Größe;Gewicht;Raucher;Geboren;Stadt;Nr.;Kauf"]
    for number in range(rows):
        a, city = draw.gauss(0, 1), draw.choice(["Köln", "Bonn"])
        bought = a + (city == "Köln") + draw.gauss(0, 0.3) > 0.3
        weight = "" if draw.random() < 0.1 else f"{60 + 8 * a:.1f}".replace(".", ",")
        day = f"{1 + number % 28:02d}.0{1 + number % 9}.1980"
        size = f"{1.7 + a / 10:.3f}".replace(".", ",")
        lines.append(
            f"{size};{weight};{draw.choice(['ja', 'nein'])};{day};{city if draw.random() > 0.05 else ''};"
            f'"P{number}";{"gekauft" if bought else "nicht"}'
        )
    path.write_bytes(("\n".join(lines) + "\n").encode("cp1252"))


SOURCE = {"source": "csv:messung.csv", "label": "Kauf", "columns": {"Nr.": "drop"}}


def test_a_messy_table_is_shown_trained_and_predicted(folder, capsys):
    """The class by name and its probability, in the rows' order; unknown categories and gaps are named."""
    write_messy(folder / "messung.csv")
    assert main(["data", "csv:messung.csv", "label=Kauf", 'columns={"Nr.": drop}']) == 0
    shown = capsys.readouterr().out
    for word in (
        "200 rows",
        "Größe",
        "number",
        "yes-no",
        "date",
        "category",
        "left out: asked for",
        "label",
    ):
        assert word in shown
    run_in_folder(tiny(data=SOURCE, steps=120), "messy")
    other = folder / "neu.csv"
    other.write_text(
        "Stadt,Größe,Gewicht,Raucher,Geboren\nKöln,1.9,75,ja,1980-01-02\nUlm,1.5,,nein,1980-01-02\n"
    )
    assert main(["predict", "messy", "neu.csv", "--to", "aus.csv"]) == 0
    notes = capsys.readouterr().err
    with (folder / "aus.csv").open(newline="") as file:
        found = list(csv.DictReader(file))

    assert "column Stadt: Ulm: no category of the model" in notes
    assert [row["class"] for row in found] == ["gekauft", "nicht"]
    assert [row["Stadt"] for row in found] == ["Köln", "Ulm"]
    for row in found:
        assert float(row["p(gekauft)"]) + float(row["p(nicht)"]) == pytest.approx(1, abs=1e-5)
    assert main(["export", "messy", "--to", "modell"]) == 0
    assert main(["predict", "modell", "messung.csv", "--to", "alle.csv"]) == 0
    with (folder / "alle.csv").open(newline="") as file:
        everything = list(csv.DictReader(file))
    assert np.mean([row["class"] == row["Kauf"] for row in everything]) > 0.85


def test_regressions_and_sets_of_labels_are_predicted(folder, capsys):
    """Values in their own unit; the best labels with their scores."""
    draw = np.random.default_rng(0).standard_normal((80, 2))
    lines = [f"{a:.4f},{b:.4f},{1000 + 50 * a:.3f}" for a, b in draw]
    (folder / "v.csv").write_text("\n".join(["a,b,y", *lines, ""]))
    lines = [f"{a:.4f},{b:.4f},{'p|q' if a > 0 else 'q|r'}" for a, b in draw]
    (folder / "l.csv").write_text("\n".join(["a,b,labels", *lines, ""]))
    values = tiny(task="regression", data={"source": "csv:v.csv", "label": "y"}, steps=200)
    run_in_folder({**values, "loss": "squared-error", "optimizer": {"lr": 0.03}}, "values")
    sets = tiny(task="multi-label", data={"source": "csv:l.csv"}, steps=60)
    run_in_folder({**sets, "loss": "decoupled-softmax"}, "labels")
    assert main(["predict", "values", "v.csv", "--to", "v2.csv"]) == 0
    assert main(["predict", "labels", "l.csv", "--to", "l2.csv"]) == 0
    with (folder / "v2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["value"]) - float(row["y"]) for row in rows]
    assert np.sqrt(np.mean(np.square(errors))) < 15
    with (folder / "l2.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = [{row["label 1"], row["label 2"]} == set(row["labels"].split("|")) for row in rows]
    assert np.mean(right) > 0.8
    capsys.readouterr()


def test_arrays_are_predicted_as_arrays(folder, capsys):
    """And a table is refused where the model knows of no columns."""
    run_in_folder(tiny(steps=20, data={"source": "wine"}), "wine")
    np.savez(folder / "x.npz", x=np.random.default_rng(0).standard_normal((3, 13)))
    assert main(["predict", "wine", "x.npz"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    (folder / "t.csv").write_text("a,b\n1,2\n")
    assert main(["predict", "wine", "t.csv"]) == 2
    assert "was trained on arrays; give an npz file with x" in capsys.readouterr().err


def test_text_is_scored_by_document(folder, capsys, monkeypatch):
    from lossworks.runs import RunFolder
    from lossworks.training.checkpoints.checkpoint import CheckpointStore
    from lossworks.training.loop import Job, train
    from lossworks.training.weights.export import export_run

    spec = tiny_spec(write_text(folder / "text.txt"))
    run = RunFolder.create(spec, "words")
    corpus = prepared(spec)
    train(Job(spec, corpus.folder, CheckpointStore(run.checkpoints, keep=2), lambda *_: None))
    export_run(run, folder / "model")
    (folder / "new.jsonl").write_text('{"text": "abc def"}\n{"text": "ghi"}\n')
    assert main(["predict", "model", "new.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[0] == "document,nats per token,bits per byte"
    assert len(lines) == 3


def test_predictions_can_be_read_again_and_never_replace_what_is_read(folder, capsys):
    write_messy(folder / "messung.csv")
    run_in_folder(tiny(data=SOURCE, steps=5), "messy")
    assert main(["predict", "messy", "messung.csv", "--to", "out.csv"]) == 0
    assert main(["predict", "messy", "out.csv", "--to", "again.csv"]) == 0
    assert len((folder / "again.csv").read_text().splitlines()) == 201
    capsys.readouterr()
    before = (folder / "messung.csv").read_bytes()
    assert main(["predict", "messy", "messung.csv", "--to", "messung.csv"]) == 2
    assert "is the file that is read, which would be lost" in capsys.readouterr().err
    assert (folder / "messung.csv").read_bytes() == before


def test_rows_without_a_label_are_seen_before_training_is_refused(folder, capsys):
    """Fields are named as in a spec, as errors name them."""
    (folder / "a.csv").write_text("x,y\n1,a\n2,\n3,b\n")

    assert main(["data", "csv:a.csv", "data.label=y"]) == 0
    assert "y: 1 rows have no label, and no training takes those" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "nothing", "x.csv"], "run nothing: not found"),
        (["data", "x.csv"], "x.csv: give a table, csv:PATH or parquet:PATH"),
        (["data", "csv:x.csv"], "data.source: x.csv: no such file"),
        (
            ["data", "csv:messung.csv", "data.label=Kauff"],
            "data.label=Kauff is no column; did you mean Kauf?",
        ),
    ],
)
def test_mistakes_are_named(arguments, message, folder, capsys):
    """Also where another column could not be read either: what was typed comes first."""
    write_messy(folder / "messung.csv")
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
