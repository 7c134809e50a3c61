"""A Ray cluster for trainings that are not packed: the one that is there, or one of this machine's own."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from lossworks.adapters.ray_private import start_ray
from lossworks.errors import UserError
from lossworks.home import ray_variables
from lossworks.ports import require_answer
from lossworks.tracking import usable_cpus

WAITING_CPUS = 0.01
"""CPUs of a process that waits for the workers it has started; Ray takes no 0."""

ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # our own display shows the trials
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in specs are from where the command was called
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


def room(at_once: int | None, cpus: float, free: float) -> int:
    """Return how many trainings have room.

    Args:
        at_once: How many are asked for; None for as many as have room.
        cpus: Of each.
        free: CPUs that there are for them.

    Raises:
        UserError: There is room for fewer than are asked for, or for none.
    """
    found = int(free // cpus)
    least = at_once or 1
    if found < least:
        raise UserError(
            f"at_once={least}: trials of {cpus:g} CPUs each need {cpus * least:g}, but {free:g} are free; "
            "use fewer at once, or fewer workers in the base"
        )
    return at_once or found


@contextmanager
def cluster(address: str | None) -> Iterator[float]:
    """Connect to a Ray cluster, or start one here; give how many CPUs are free."""
    import ray

    if ray.is_initialized():
        yield ray.available_resources().get("CPU", 0.0)
        return
    require_answer(address)
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    usable = usable_cpus()
    alone = address is None and "RAY_ADDRESS" not in os.environ
    try:
        start_ray(
            ray,
            address="local" if alone else address,
            # One more than there are, for the processes that wait for the workers they have started.
            num_cpus=usable + 1 if alone else None,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": ray_variables(ENVIRONMENT)},
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--address {address}: no Ray cluster answers there: {lines[0]}") from None
    try:
        yield float(usable) if alone else ray.available_resources().get("CPU", 0.0)
    finally:
        ray.shutdown()
