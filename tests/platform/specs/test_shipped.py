"""The specs that the documentation names are found from any folder."""

from pathlib import Path

import pytest

from lossworks.cli import main
from lossworks.specs.shipped import spec_file

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
