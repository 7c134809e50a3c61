"""YAML of specs: what is text stays text, nothing is read twice, and nothing can grow without end."""

import os
import time

import pytest

from lossworks.errors import UserError, printable
from lossworks.specs.base import read_yaml
from lossworks.specs.yaml_text import YamlError, read_text, read_value
from lossworks.tasks import parse_train_spec, read_train_spec


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        (".5", 0.5),
        ("10", 10),
        ("-3", -3),
        ("0", 0),
        ("007", "007"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-13-45", "2026-13-45"),
        ("2026-11-27", "2026-11-27"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
        ("9" * 4000, "9" * 4000),
        ("[1, 1e-3, a]", [1, 1e-3, "a"]),
    ],
)
def test_scalars_are_those_of_json_and_text(text, value):
    found = read_text(text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("text:dir #1/a.txt", "text:dir #1/a.txt"),
        ("007", "007"),
        ("true", "true"),
        ("1:30", "1:30"),
        ("a: b", "a: b"),
        ("[x]", "[x]"),
        ('"quoted # text"', "quoted # text"),
        ("null", None),
        ("*.txt", "*.txt"),
    ],
)
def test_a_text_field_takes_an_override_as_it_is(text, value):
    assert read_value(text, as_text=True) == value


def test_overrides_and_files_are_read_alike(tmp_path):
    """A learning rate is a number in both, and a name is a name."""
    file = tmp_path / "spec.yaml"
    file.write_text("kind: training\ntask: classification\nname: 1:30\noptimizer: {lr: 1e-4}\n")
    spec = read_train_spec(file, ["loss=ldr", "loss.temperature=1e-1", "data.source=csv:a #1.csv"])

    assert (spec.name, spec.optimizer.lr) == ("1:30", 1e-4)
    assert spec.loss.hyperparameters["temperature"] == 0.1
    assert spec.data.source == "csv:a #1.csv"
    assert read_train_spec(file, ["name=007"]).name == "007"
    assert parse_train_spec(spec.model_dump(mode="json")) == spec


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2\n", "line 2: the key 'steps' is there twice"),
        ("model:\n  width: 1\n  width: 2\n", "line 3: the key 'width' is there twice"),
        (BOMB, "holds more than 100,000 values"),
        ("[" * 5000, "nests deeper than 40 levels"),
        ("{a: " * 60 + "1" + "}" * 60, "nests deeper than 40 levels"),
        ("# " + "x" * 2**20, "a spec has 1,048,576 at most"),
        ("a: [1, 2", "is not valid YAML: while parsing a flow sequence at line 1, column 4"),
        ("a: !!python/object/apply:os.system [x]", "is not valid YAML"),
        ("a: \x00b", "is not valid YAML"),
        ("? [a, b]\n: 1", "line 1: a key must be a word or a number"),
        ("a: *nothing", "is not valid YAML"),
    ],
)
def test_what_can_not_be_read_is_refused_at_once(text, message):
    began = time.perf_counter()
    with pytest.raises(YamlError) as refused:
        read_text(text)

    assert message in str(refused.value)
    assert len(str(refused.value)) < 500
    assert time.perf_counter() - began < 5


def test_files_that_are_none_are_named(tmp_path):
    """Pipes never end, so they are not opened."""
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfname: x\n")

    for name, message in (
        ("pipe.yaml", "is no ordinary file"),
        ("empty.yaml", "is empty; a spec is a mapping"),
        ("latin.yaml", "can't be read"),
        (".", "is no file"),
        ("nothing.yaml", "no such spec file"),
    ):
        with pytest.raises(UserError, match=message):
            read_yaml(tmp_path / name)
    assert read_yaml(tmp_path / "bom.yaml") == {"name": "x"}


def test_messages_stay_short():
    """However many keys are wrong, and however long a value is."""
    began = time.perf_counter()
    with pytest.raises(UserError) as refused:
        parse_train_spec({f"unknown{number}": number for number in range(5000)} | {"name": "x" * 100_000})

    assert "and 4993 more" in str(refused.value)
    assert len(str(refused.value)) < 4000
    assert time.perf_counter() - began < 5
    with pytest.raises(UserError) as refused:
        parse_train_spec({"steps": "x" * 100_000})
    assert len(str(refused.value)) < 500


def test_nothing_steers_a_terminal():
    assert printable("a\x1b[31mb\x07\n\ud800 ±") == "a\\x1b[31mb\\x07\n\\ud800 ±"
