"""Run a function in several real processes of torch.distributed over gloo, and get what it returns."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lossworks.training.distributed.local_ranks import run_local_ranks
from lossworks_testing.forkserver import IMPORTED


def run_ranks(workers: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Return ``function(*arguments)`` of every rank, in order; an exception of any rank is raised.

    ``function`` must be importable by name and its result plain data.
    """
    run_local_ranks(workers, _keep, function, arguments, str(folder), dict(os.environ), imports=IMPORTED)
    return [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(workers)]  # noqa: S301


def _keep(function: Callable, arguments: tuple, folder: str, environment: dict[str, str]) -> None:
    # The caller's as it is now.
    os.environ.clear()
    os.environ.update(environment)
    Path(folder, f"rank-{dist.get_rank()}").write_bytes(pickle.dumps(function(*arguments)))
