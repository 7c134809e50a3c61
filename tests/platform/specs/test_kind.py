"""What a spec's file describes: said by its line ``kind``, told by its fields in older files."""

from pathlib import Path

import pytest
import yaml

from lossworks.errors import UserError
from lossworks.specs.base import KINDS, kind_of
from lossworks.tasks import parse_train_spec, read_train_spec
from lossworks.tasks.classification import ClassifierSpec

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = sorted(ROOT.glob("*/specs/*.yaml")) + sorted(ROOT.glob("*/studies/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_every_shipped_spec_says_its_kind(path):
    """And would not be taken for another without it."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    kind = values.pop("kind")

    assert kind in KINDS
    assert kind_of(values) in (kind, None)


def test_a_file_without_its_kind_works_with_a_hint(tmp_path, capsys):
    """The line to add, once for each file, on stderr; the resolved spec has it."""
    for name, values in (("some", "task: classification\n"), ("none", "name: other\n")):
        file = tmp_path / f"{name}.yaml"
        file.write_text(values)
        spec = read_train_spec(file)
        read_train_spec(file)
        printed = capsys.readouterr()

        assert printed.err.splitlines() == [
            f"lossworks: hint: {file} does not say what it describes; add the line `kind: training`"
        ]
        assert printed.out == ""
        assert spec.to_yaml().startswith("kind: training\n")


def test_a_file_with_its_kind_gives_no_hint(tmp_path, capsys):
    file = tmp_path / "spec.yaml"
    file.write_text(ClassifierSpec.parse({"task": "classification"}).to_yaml())
    read_train_spec(file, ["steps=3"])

    assert capsys.readouterr().err == ""


def test_a_task_alone_tells_no_kind():
    """Federations have one, too."""
    assert kind_of({"task": "language-model"}) is None
    assert kind_of({"task": "language-model", "split": {"clients": 3}}) == "federation"
    assert kind_of({"task": "language-model", "steps": 3}) == "training"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sweep", "steps": 3}, "spec: describes a sweep, which `lossworks tune` runs and resumes"),
        ({"kind": "study"}, "spec: describes a study, which `lossworks study` runs and resumes"),
        ({"strategies": ["fedavg"]}, "spec: describes a federation, which `lossworks federate` runs"),
        ({"kind": "trainning"}, "kind='trainning': there is no such kind of spec; did you mean training"),
        ({"kind": ["x"]}, "it must be one of study, sweep, federation, training"),
        ({"kind": None}, "kind=None: there is no such kind of spec"),
    ],
)
def test_another_kind_is_refused(values, message):
    """In one sentence, with the command that runs it."""
    with pytest.raises(UserError) as error:
        parse_train_spec(values)
    assert message in str(error.value)
