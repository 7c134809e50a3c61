"""What all tests share: repeatable examples, one Ray instance, GPU tests skipped where there is no GPU."""

import pytest
from hypothesis import settings

from lossworks.home import QUIET_ENVIRONMENT, prepare_process

# The same examples at every run, however busy the machine; `--hypothesis-profile=default` looks further.
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    """Skip tests marked ``gpu`` on machines without one."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use; this machine has none"))


@pytest.fixture(scope="session", autouse=True)
def home_of_last_resort(tmp_path_factory):
    """A home folder for tests that forget to have one of their own: never the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("last-resort")))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_proxy():
    """No way beyond this machine: what is started here is asked directly, also where a proxy is set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_usage_reports():
    """No report home from the libraries that tests call and start themselves."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in QUIET_ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def cluster():
    """A Ray instance of four logical CPUs; yields its address."""
    import ray

    prepare_process()  # or anybody on this machine could use it

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        context = ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            # Ten seconds unless said otherwise: longer than the runs whose metrics are looked for.
            _system_config={"metrics_report_interval_ms": 500},
        )
        yield context.address_info["gcs_address"]
        ray.shutdown()
