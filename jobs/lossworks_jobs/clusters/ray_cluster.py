"""A Ray cluster to train on: joined, or started on this machine."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from lossworks.adapters.ray_private import WITHOUT_IDLE_WORKERS, start_ray
from lossworks.errors import UserError
from lossworks.home import ray_variables
from lossworks.ports import require_answer
from lossworks.signals import hangups_ignored
from lossworks.specs import RunSpec
from lossworks.tracking import usable_cpus
from lossworks_jobs.clusters.local_nodes import use_token

_LOST_AFTER_S = 60.0


@contextmanager
def cluster(spec: RunSpec, address: str | None) -> Iterator[None]:
    """Connect to the Ray cluster at ``address`` or ``$RAY_ADDRESS``, or start one here.

    What was started is shut down at the end; a cluster that was joined goes on.

    Raises:
        UserError: There is no cluster at the address, or it can't hold the workers.
    """
    # The controller polls this often; the default of 2 s would be added to the end of every run and to the
    # detection of a lost worker. Ray Train passes its variables on from here.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if spec.elastic.min_workers is not None:
        # A lost node may count for some seconds; then too many workers are asked for, and waited for as long.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    import ray

    if ray.is_initialized():
        require_room(spec, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
        return
    _start(address)
    if OwnNode().there:
        from lossworks_jobs.ray_train_private import start_coordinator

        start_coordinator()
    try:
        require_room(spec, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    import ray

    own: dict[str, Any] = {}
    require_answer(address)
    if address is not None:
        use_token(address)
    elif "RAY_ADDRESS" not in os.environ:
        # What runs here may be another run's own, which lets nobody in and ends with it.
        address = "local"
        own = WITHOUT_IDLE_WORKERS
    try:
        with hangups_ignored():
            start_ray(
                ray,
                address=address,
                include_dashboard=False,
                # Workers leave what a person should see in the run's folder; the rest is in Ray's own logs.
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": ray_variables()},
                **own,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster answers there: {first_line}") from None


class OwnNode:
    """The node of Ray that this process has started, if it has one.

    When it is lost, Ray's library ends this process within seconds; at times it waits for ever instead.
    """

    def __init__(self) -> None:
        children = psutil.Process().children()
        self._raylet = next((child for child in children if child.name() == "raylet"), None)
        self._lost_at: float | None = None

    @property
    def there(self) -> bool:
        """Whether this process has started one."""
        return self._raylet is not None

    @property
    def lost(self) -> bool:
        """Whether it has been gone for longer than Ray's library takes to notice."""
        if self._raylet is None or is_there(self._raylet):
            return False
        self._lost_at = self._lost_at or time.monotonic()
        return time.monotonic() - self._lost_at > _LOST_AFTER_S


def is_there(process: psutil.Process) -> bool:
    """Return whether a process is there and no zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def threads(spec: RunSpec) -> int:
    """Return how many threads a worker computes with: its whole CPUs, at least one."""
    return max(1, int(spec.resources_per_worker.get("CPU", 1)))


def require_local_resources(spec: RunSpec) -> None:
    """Check a spec against this machine, without starting anything.

    Raises:
        UserError: The workers need more CPUs than this process may use.
    """
    require_room(spec, [{"CPU": float(usable_cpus())}], only=("CPU",))


def require_room(spec: RunSpec, nodes: Sequence[Mapping[str, float]], only: tuple[str, ...] = ()) -> None:
    """Check that nodes can hold the workers, or as many as elastic training needs.

    Args:
        spec: The run.
        nodes: What each node has, by resource, as Ray counts it.
        only: Check these resources alone; all if empty.

    Raises:
        UserError: Naming a resource that is too little, what is needed and what there is.
    """
    workers = spec.least_workers
    each = {
        name: need for name, need in spec.resources_per_worker.items() if need and name in (only or [name])
    }
    for name, need in each.items():
        there = sum(node.get(name, 0.0) for node in nodes)
        if need * workers > there:
            raise UserError(
                f"workers={workers} with resources_per_worker.{name}={need:g} need {need * workers:g} "
                f"{name}, but there are {there:g}: use fewer workers or less {name} for each"
            )
    room = sum(
        int(min((node.get(name, 0.0) // need for name, need in each.items()), default=workers))
        for node in nodes
    )
    if room < workers:
        raise UserError(
            f"workers={workers} with resources_per_worker={dict(each)}: there is "
            f"room for {room} on {len(nodes)} nodes, a worker lies on one: use fewer or smaller ones"
        )


def lacking(spec: RunSpec) -> str | None:
    """Return what workers that have not started wait for, or None if it is not for room."""
    import ray
    from ray.util import placement_group_table

    # While workers start, their own group has taken the room; where there is no group, training is elastic.
    pending = any(group["state"] == "PENDING" for group in placement_group_table().values())
    if not pending and spec.elastic.min_workers is None:
        return None
    free = ray.available_resources()
    workers = spec.least_workers
    short = [
        f"{need * workers:g} {name}, of which {free.get(name, 0.0):g} are free"
        for name, need in spec.resources_per_worker.items()
        if need * workers > free.get(name, 0.0)
    ]
    return f"waiting for {' and '.join(short)}" if short else None
