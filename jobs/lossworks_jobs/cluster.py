"""A Ray cluster to train on: joined, or started on this machine."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from lossworks.errors import UserError
from lossworks.home import QUIET_ENVIRONMENT
from lossworks.specs import RunSpec


@contextmanager
def cluster(spec: RunSpec, address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at ``address``, or to one found running, or start one here.

    What was started is shut down at the end; a cluster that was joined goes on.

    Raises:
        UserError: There is no cluster at the address, or it can't hold the workers.
    """
    # The controller polls this often; the default of 2 s would be added to the end of every run and to the
    # detection of a lost worker. Ray Train passes its variables on from here.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    if ray.is_initialized():
        require_resources(spec, ray.available_resources())
        yield
        return
    _start(address)
    try:
        require_resources(spec, ray.available_resources())
        yield
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    import ray

    if address is not None:
        _require_answer(address)
    try:
        ray.init(
            address=address,
            include_dashboard=False,
            # Workers leave what a person should see in the run's folder; the rest is in Ray's own logs.
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": QUIET_ENVIRONMENT},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster answers there: {first_line}") from None


def _require_answer(address: str) -> None:
    """Refuse an address that nothing listens at; Ray itself would try for more than a minute.

    Raises:
        UserError: No connection within some seconds.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and "local" are Ray's own words
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise UserError(f"--address {address}: no Ray cluster answers there: {error}") from None


def threads(spec: RunSpec) -> int:
    """Return how many threads a worker computes with: its whole CPUs, at least one."""
    return max(1, int(spec.resources_per_worker.get("CPU", 1)))


def require_local_resources(spec: RunSpec) -> None:
    """Check a spec against this machine, without starting anything.

    Raises:
        UserError: The workers need more CPUs than this process may use.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    require_resources(spec, {"CPU": float(usable)}, only=("CPU",))


def require_resources(spec: RunSpec, free: Mapping[str, float], only: tuple[str, ...] = ()) -> None:
    """Check that ``free`` holds all workers.

    Args:
        spec: The run.
        free: Amounts by resource, as Ray counts them.
        only: Check these resources alone; all if empty.

    Raises:
        UserError: Naming the resource, what is needed and what is free.
    """
    for name, each in spec.resources_per_worker.items():
        needed, there = each * spec.workers, free.get(name, 0.0)
        if needed > there and (not only or name in only):
            raise UserError(
                f"workers={spec.workers} with resources_per_worker.{name}={each:g} need {needed:g} {name}, "
                f"but {there:g} are free: use fewer workers or less {name} for each"
            )
