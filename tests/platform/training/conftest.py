"""A corpus and a spec that every training test shares."""

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks_testing.training import prepared, tiny_spec


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text file."""
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def corpus(text, tmp_path_factory):
    """The folder of the text's tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        return str(prepared(tiny_spec(text)).folder)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
