"""The specs that the documentation names are found from any folder."""

from pathlib import Path

import pytest

from lossworks.cli import main
from lossworks.errors import UserError
from lossworks.specs.shipped import shipped_specs, spec_file

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("file", sorted(ROOT.glob("*/specs/*.yaml")), ids=lambda file: file.stem)
def test_a_spec_of_the_sources_is_found_elsewhere(file, tmp_path, monkeypatch):
    """By the place that it has in them."""
    monkeypatch.chdir(tmp_path)

    assert spec_file(file.relative_to(ROOT).as_posix()).samefile(file)


def test_a_spec_that_another_names_is_found(tmp_path, monkeypatch):
    """A sweep names its base by the way from its own folder."""
    monkeypatch.chdir(tmp_path)
    found = spec_file("tune/specs/../../jobs/specs/digits.yaml")

    assert found.samefile(ROOT / "jobs" / "specs" / "digits.yaml")


def test_a_file_that_is_here_comes_first(tmp_path, monkeypatch):
    """Whoever has written one of that name gets it."""
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "jobs" / "specs" / "demo.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("kind: training\n")

    assert spec_file("jobs/specs/demo.yaml").samefile(own)


@pytest.mark.parametrize(
    "name", ["jobs/specs/demoo.yaml", "nowhere/specs/demo.yaml", "/jobs/specs/demo.yaml", "demo.yaml"]
)
def test_what_is_not_there_is_refused_by_the_name_that_was_given(name, tmp_path, monkeypatch, capsys):
    """Nothing else stands in for it."""
    monkeypatch.chdir(tmp_path)

    assert main(["train", name]) == 2
    assert f"{name}: no such spec file" in capsys.readouterr().err


def test_a_name_is_enough_where_one_spec_has_it(tmp_path, monkeypatch):
    """A file of that name here wins; where several have it, they are named."""
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()

    assert spec_file("demo").samefile(ROOT / "jobs/specs/demo.yaml")
    with pytest.raises(
        UserError, match=r"digits: there are federated/specs/digits.yaml and jobs/specs/digits"
    ):
        spec_file("digits")
    Path("digits").write_text("kind: training\n")
    assert spec_file("digits") == Path("digits")


def test_specs_are_listed_printed_and_copied(tmp_path, capsys):
    """A copy is never written over a file."""
    own = tmp_path / "my.yaml"

    assert main(["specs"]) == 0
    listed = capsys.readouterr().out
    assert main(["specs", "demo", "--to", str(own)]) == 0
    assert main(["specs", "demo", "--to", str(own)]) == 2
    assert "File exists" in capsys.readouterr().err
    assert main(["specs", "demmo"]) == 2
    assert "no such spec; there are" in capsys.readouterr().err
    assert main(["specs", "demo"]) == 0

    assert [place for place in shipped_specs() if place not in listed] == []
    assert capsys.readouterr().out == own.read_text() == (ROOT / "jobs/specs/demo.yaml").read_text()
