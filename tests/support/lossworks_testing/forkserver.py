"""Processes that need not import anything: forked from one that has imported what tests need."""

import multiprocessing
from multiprocessing.context import ForkServerContext

# The server keeps what it had when the first process was asked for, so there is one list for all.
IMPORTED = (
    "lossworks.training.loop",
    "lossworks_testing.ranks",
    "lossworks_testing.soak",
    "lossworks_testing.training",
    "mlflow",
    "mlflow.store.tracking.rest_store",
)


def forkserver() -> ForkServerContext:
    """Return how to start processes; they have the environment of when the first one was started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context
