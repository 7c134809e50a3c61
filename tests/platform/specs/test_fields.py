"""The fields of specs in words and as a JSON schema: `--fields` and `--schema`."""

import json

import pytest
from pydantic import TypeAdapter

from lossworks.cli import main
from lossworks.specs.fields import fields_in_words
from lossworks.tasks import read_train_spec


def shown(capsys, *arguments):
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_every_field_of_the_printed_spec_is_explained():
    spec = read_train_spec("jobs/specs/digits.yaml")
    fields = {field.path: field for field in fields_in_words(spec)}

    for path in spec.flat():  # what is a mapping of free names is one field
        assert path in fields or path.rpartition(".")[0] in fields, path
    assert fields["optimizer.lr"].value == 0.002
    assert fields["optimizer.lr"].allowed == "a number above 0 and at most 10"
    assert fields["sharding.kind"].allowed == "one of none, ddp, fsdp"
    assert fields["optimizer.clip_norm"].allowed == "a number above 0, or null"
    assert all(field.meaning or field.allowed for field in fields.values() if field.path != "kind")


def test_hyperparameters_of_what_a_spec_names_are_fields():
    fields = {
        field.path: field
        for field in fields_in_words(read_train_spec("jobs/specs/digits.yaml", ["loss=ldr"]))
    }

    assert fields["loss.temperature"].allowed.startswith("a number")
    assert fields["loss.temperature"].meaning


@pytest.mark.parametrize(
    ("command", "spec", "name", "path"),
    [
        ("train", "demo", "lr", "optimizer.lr="),
        ("train", "digits", "optimizer", "optimizer.weight_decay="),
        ("tune", "label-noise", "trials", "trials="),
        ("federate", "digits", "rounds", "rounds="),
        ("study", "dice", "seeds", "seeds="),
    ],
)
def test_every_command_explains_its_spec(command, spec, name, path, capsys):
    text = shown(capsys, command, spec, "--fields", name)

    assert path in text
    assert all(len(line) <= 110 for line in text.splitlines())


def test_a_mistyped_name_gets_the_nearest(capsys):
    assert main(["train", "jobs/specs/digits.yaml", "--fields", "optimiser.lr"]) == 2
    assert "did you mean optimizer.lr?" in capsys.readouterr().err


def test_the_schema_takes_the_spec_and_what_is_short_for_it(capsys):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(shown(capsys, "train", "jobs/specs/digits.yaml", "--schema"))
    whole = read_train_spec("jobs/specs/digits.yaml").model_dump(mode="json")

    jsonschema.validate(whole, schema)
    jsonschema.validate({**whole, "sharding": "ddp", "loss": "ldr"}, schema)
    jsonschema.validate({**whole, "loss": ["cross-entropy", {"name": "log-z", "weight": 1e-4}]}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**whole, "steps": -1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**whole, "stepps": 1}, schema)
    assert TypeAdapter(dict).validate_python(schema["properties"])
