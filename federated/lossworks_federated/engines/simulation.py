"""``engine=flower``: Flower's own simulation, a process a core, over Ray."""

import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lossworks.errors import RunError
from lossworks.home import prepare_process
from lossworks.tracking import usable_cpus
from lossworks_federated.specs import FederationSpec

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid


_LIMIT_S = 120.0
_LOOK_S = 0.05


def await_clients(grid: "Grid", clients: int, limit_s: float) -> None:
    """Wait until all clients are connected: who is drawn depends on who is there.

    Raises:
        RunError: They are not after ``limit_s`` seconds.
    """
    end = time.monotonic() + limit_s
    while (there := len(list(grid.get_node_ids()))) < clients:
        if time.monotonic() > end:
            raise RunError(f"split.clients={clients}: only {there} nodes connected within {limit_s:g} s")
        time.sleep(_LOOK_S)


def simulate(spec: FederationSpec, app: "ClientApp", work: Callable[["Grid"], None]) -> None:
    """Do ``work`` with the Grid of a simulation that has the spec's clients.

    Args:
        spec: The federation.
        app: What clients run.
        work: Called in a thread.

    Raises:
        RunError: The simulation failed.
    """
    prepare_process()  # Flower starts Ray
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from lossworks_federated.flower_private import settle_telemetry

    settle_telemetry()
    server = ServerApp()
    failures: list[BaseException] = []

    @server.main()
    def _main(grid: "Grid", context: "Context") -> None:
        del context
        try:
            await_clients(grid, spec.split.clients, _LIMIT_S)
            work(grid)
        except BaseException as error:
            failures.append(error)
            raise

    # Its advice to use the command line doesn't fit a library that calls it.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run_simulation(
                server,
                app,
                spec.split.clients,
                backend_config={
                    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                    "init_args": _ray_arguments(),
                },
            )
        except Exception as error:
            if failures:
                raise failures[0] from None
            raise RunError(f"engine=flower: the simulation failed: {error}") from error


def _ray_arguments() -> dict[str, Any]:
    """Return how Flower starts Ray: on this machine for itself, or joined where a job runs on a cluster."""
    arguments: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if "RAY_ADDRESS" in os.environ:
        return arguments
    here = {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False}
    return arguments | here
