"""A home of their own, and a small run."""

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks_testing.training import tiny_spec


@pytest.fixture(scope="session")
def session_home(tmp_path_factory):
    """A home folder that all job tests share: creating a tracking store takes seconds."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def home(session_home, monkeypatch):
    """The shared home folder, in force."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(session_home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return session_home


@pytest.fixture(scope="session")
def spec(tmp_path_factory):
    """A run of two workers long enough to be interrupted: some seconds of steps, a checkpoint every 20."""
    return tiny_spec(
        write_text(tmp_path_factory.mktemp("text") / "text.txt", words=20000),
        name="small",
        steps=120,
        batch_size=16,
        workers=2,
        sharding="ddp",
        data={"sequence_length": 32},
        model={"width": 32},
        optimizer={"lr": 0.01},
        evaluation={"every": 40, "sequences": 8},
        checkpoint={"every": 20},
        tracking={"system_metrics": False, "model": False},
    )
