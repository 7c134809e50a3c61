"""One Ray instance for all tests that need one, a home of their own, and a small run."""

import pytest

from lossworks_testing.training import tiny_spec, write_text


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
def cluster():
    """A Ray instance of four logical CPUs; yields its address."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        context = ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()


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
        tracking={"system_metrics": False},
    )
