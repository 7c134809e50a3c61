"""Paths in specs: other processes have other working folders, so what a run keeps is absolute."""

import pytest

from lossworks.errors import UserError
from lossworks.specs.files import located, require_files
from lossworks.tasks import parse_train_spec
from lossworks_testing.offered import Distillation, offer


class ToThree(Distillation):
    """Reads three companions."""

    slug = "to-three"
    roles = ("teacher", "reference", "other")


def test_local_paths_become_absolute(tmp_path, monkeypatch):
    """Of data, of weights and of companions where there is such a folder; names of runs stay names."""
    offer(monkeypatch, ToThree)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    spec = parse_train_spec(
        {
            "task": "classification",
            "data": {"source": "csv:flowers.csv"},
            "start": "model",
            "loss": "to-three",
            "roles": {"teacher": "model", "reference": "start", "other": "a-run"},
        }
    )
    found = located(spec)

    assert found.data.source == f"csv:{tmp_path / 'flowers.csv'}"
    assert found.start == str(tmp_path / "model")
    assert [role.of for role in found.roles.values()] == [str(tmp_path / "model"), "start", "a-run"]
    assert located(found) is found


def test_paths_of_images_sounds_and_cubes_become_absolute(tmp_path, monkeypatch):
    """Workers have other working folders."""
    monkeypatch.chdir(tmp_path)
    sources = {
        "segmentation": {"source": "folder:mine", "priors": "csv:shares.csv"},
        "separation": {"source": "folder:mine"},
        "pansharpening": {"source": "npz:mine"},
    }
    for task, data in sources.items():
        found = located(parse_train_spec({"task": task, "data": data}))

        assert found.data.source == f"{data['source'].partition(':')[0]}:{tmp_path / 'mine'}"
    values = {"task": "segmentation", "data": sources["segmentation"], "loss": "sfda"}
    assert located(parse_train_spec(values)).data.priors == f"csv:{tmp_path / 'shares.csv'}"
    assert parse_train_spec({**values, "data": {"priors": "exact"}}).data.priors == "exact"


def test_a_companion_that_is_not_there_is_refused_before_anything_starts():
    """A checkpoint of transformers; whether there is a run of a name is looked up elsewhere."""
    values = {"loss": [{"name": "distillation"}], "roles": {"teacher": "hf:/nowhere"}}
    with pytest.raises(UserError, match=r"roles\.teacher\.of=hf:/nowhere: no such file or folder"):
        require_files(parse_train_spec(values))


def test_what_is_no_path_stays():
    """A corpus of the interpreter, and examples that are built in."""
    for values in ({}, {"task": "classification"}):
        spec = parse_train_spec(values)
        assert located(spec) is spec
