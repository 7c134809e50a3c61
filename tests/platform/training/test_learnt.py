"""What a run has learnt from its data besides weights stays what it was, whatever becomes of the data."""

import json

import numpy as np
import pytest
import torch

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.errors import UserError
from lossworks.models import load_classifier
from lossworks.runs import RunFolder
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, Trainer
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks.training.weights.start import learnt_by
from lossworks_jobs.training.train import _prepare
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_in_folder, tiny_spec


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_table(path, *, names=("ant", "bee", "cat"), further=()):
    """Write three clouds of points, and rows that came later."""
    stream = np.random.default_rng(0)
    lines = ["a,b,label"]
    for number, name in enumerate(names):
        points = stream.standard_normal((40, 2)) + 4 * number
        lines += [f"{x:.6f},{y:.6f},{name}" for x, y in points]
    path.write_text("\n".join([*lines, *further]) + "\n")


def table_run(path, run_id="table", **changes):
    return run_in_folder(tiny(data={"source": f"csv:{path}"}, steps=60, **changes), run_id)


def config(folder):
    found = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in found.items() if name != "provenance"}


def test_rows_that_came_later_change_nothing_of_an_export(tmp_path):
    """Scale, classes and what it says of a point; without the file it is exported as well."""
    table = tmp_path / "points.csv"
    write_table(table)
    folder = table_run(table)
    export_run(folder, tmp_path / "before")
    write_table(table, further=["4000,-3000,cat"] * 5)
    export_run(folder, tmp_path / "after")
    table.unlink()
    export_run(folder, tmp_path / "without")
    points = np.array([[0.0, 0.1], [4.0, 4.1], [8.2, 8.0]])

    expected = load_classifier(tmp_path / "before").probabilities(points)
    for name in ("after", "without"):
        assert config(tmp_path / name) == config(tmp_path / "before")
        assert np.array_equal(load_classifier(tmp_path / name).probabilities(points), expected)


def test_a_model_is_evaluated_on_other_data_by_its_own_scale_and_classes(tmp_path):
    """Two of its classes, in another order and far from the training data's mean: as good as before."""
    table, other = tmp_path / "points.csv", tmp_path / "other.csv"
    write_table(table)
    export_run(table_run(table), tmp_path / "model")
    rows = [line for line in table.read_text().splitlines() if not line.endswith("ant")]
    other.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    found = evaluate_folder(tmp_path / "model", overrides=[f"data.source=csv:{other}"])

    assert found.yardsticks["eval/accuracy"] > 0.9
    other.write_text("a,b,label\n0,0,ant\n1,1,ant\n2,2,dog\n3,3,dog\n")
    with pytest.raises(UserError, match=r"'dog' is none of the classes of .*model, which are ant, bee, cat"):
        evaluate_folder(tmp_path / "model", overrides=[f"data.source=csv:{other}"])
    other.write_text("a,label\n0,ant\n1,ant\n2,bee\n3,bee\n")
    with pytest.raises(UserError, match="lacks the columns b, which the model reads"):
        evaluate_folder(tmp_path / "model", overrides=[f"data.source=csv:{other}"])


def test_going_on_with_other_data_is_refused_unless_asked_for(tmp_path):
    """Then the scale stays; a class that was not there before is refused whatever is asked for."""
    table = tmp_path / "points.csv"
    write_table(table)
    folder = table_run(table)
    spec = folder.spec()

    assert _prepare(spec, folder, False, None).learnt.facts == learnt_by(folder).facts
    write_table(table, further=["4000,-3000,cat"] * 5)
    with pytest.raises(UserError, match=r"data: are not what they were when run table began.*--changed-data"):
        _prepare(spec, folder, False, None)
    assert _prepare(spec, folder, True, None).learnt.facts == learnt_by(folder).facts
    write_table(table, names=("ant", "bee", "cow"))
    with pytest.raises(UserError, match="'cow' is none of the classes of run table"):
        _prepare(spec, folder, True, None)


def test_a_run_that_begins_from_another_reads_as_that_one(tmp_path):
    """Its scale and classes, since its weights know no others."""
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    write_table(first)
    folder = table_run(first)
    write_table(second, further=["4000,-3000,cat"] * 5)
    spec = parse_train_spec(tiny(data={"source": f"csv:{second}"}, start="table"))

    assert _prepare(spec, None, False, None).learnt.facts == learnt_by(folder).facts
    write_table(second, names=("ant", "bee", "cow"))
    with pytest.raises(UserError, match="'cow' is none of the classes of run table"):
        _prepare(spec, None, False, None)


def test_a_companion_with_other_classes_is_refused(tmp_path, monkeypatch):
    """Its third class would be taught as ours."""
    from lossworks.training.weights.start import check_companions
    from lossworks_testing.offered import Distillation, offer

    offer(monkeypatch, Distillation)
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    write_table(first)
    table_run(first)
    write_table(second, names=("ant", "bee", "cow"))
    values = tiny(data={"source": f"csv:{second}"}, loss="to-teacher", roles={"teacher": "table"})
    spec = parse_train_spec(values)
    with pytest.raises(UserError, match="its classes differ from the model's"):
        check_companions(spec, task_of(spec).open(spec, None))


@pytest.mark.parametrize("task", ["regression", "multi-label"])
def test_other_tasks_keep_theirs(task, tmp_path):
    """Scales of inputs and targets, and names of labels."""
    table = tmp_path / "points.csv"
    stream = np.random.default_rng(0)
    points = stream.standard_normal((60, 2))

    def write(further=()):
        rows = [
            f"{x:.5f},{y:.5f},{'p|q' if x > y else 'q|r'}"
            if task == "multi-label"
            else f"{x:.5f},{y:.5f},{x - y:.5f}"
            for x, y in points
        ]
        table.write_text("\n".join(["a,b,what", *rows, *further]) + "\n")

    write()
    values = tiny(task=task, data={"source": f"csv:{table}", "label": "what"}, loss=None, steps=5)
    values.pop("loss")
    folder = run_in_folder(values, "own")
    export_run(folder, tmp_path / "before")
    write(["900,-900,s" if task == "multi-label" else "900,-900,5000"] * 3)
    export_run(folder, tmp_path / "after")

    assert config(tmp_path / "after") == config(tmp_path / "before")


def test_text_that_came_later_changes_no_tokenizer(tmp_path):
    """The exported one and that of a run that goes on, which is asked for."""
    notes = tmp_path / "notes"
    notes.mkdir()
    write_text(notes / "a.txt")
    spec = tiny_spec(notes, data={"vocab_size": 290})
    prepared = _prepare(spec, None, False, None)
    folder = RunFolder.create(spec, "notes")
    prepared.learnt.write(folder.learnt)
    store = CheckpointStore(folder.checkpoints, keep=2)
    Trainer(Job(spec, prepared.folder, store, lambda *_: None, learnt=learnt_by(folder))).run()
    export_run(folder, tmp_path / "before")
    write_text(notes / "b.txt", seed=1)
    export_run(folder, tmp_path / "after")

    tokenizers = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("before", "after")]
    assert tokenizers[0] == tokenizers[1]
    with pytest.raises(UserError, match=r"data: are not what they were when run notes began"):
        _prepare(spec, folder, False, None)
    grown = _prepare(spec, folder, True, None)
    assert grown.folder != prepared.folder
    assert grown.learnt.files["tokenizer.json"].read_bytes() == tokenizers[0]
    assert _prepare(spec, None, False, None).learnt.files["tokenizer.json"].read_bytes() != tokenizers[0]


def test_what_is_kept_is_checked(tmp_path):
    """A file that is damaged or missing is named."""
    folder = run_in_folder(tiny(steps=3), "run")
    kept = folder.learnt / "learnt.json"
    text = kept.read_text()
    kept.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=r"learnt.json: is damaged"):
        export_run(folder, tmp_path / "model")
    kept.write_text(text.replace('"files": []', '"files": ["scale.bin"]'))
    with pytest.raises(UserError, match=r"scale.bin: is missing, and run run can't do without it"):
        export_run(folder, tmp_path / "model")


def test_settings_of_the_optimiser_are_those_of_the_spec_that_goes_on(tmp_path):
    """The restored state has moments and the step, not the settings of another day."""
    values = tiny(steps=4, checkpoint={"every": 4})
    folder = run_in_folder(values, "run")
    other = {"lr": 0.5, "weight_decay": 0.25, "betas": [0.5, 0.6], "eps": 1e-3}
    spec = parse_train_spec({**values, "steps": 5, "optimizer": other})
    found = Trainer(Job(spec, None, CheckpointStore(folder.checkpoints, keep=2), lambda *_: None))
    found.clock.start()
    found._restore()
    matrices, others = found.optimizers[0].param_groups

    assert found.step == 4
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    for group in (matrices, others):
        assert (tuple(group["betas"]), group["eps"]) == ((0.5, 0.6), 1e-3)
    assert all(torch.any(state["exp_avg"] != 0) for state in found.optimizers[0].state.values())
