"""Run a function in several real processes of torch.distributed over gloo."""

import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lossworks.ports import require_free_port
from lossworks_testing.forkserver import forkserver


def run_ranks(workers: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Return ``function(*arguments)`` of every rank, in order; an exception of any rank is raised.

    ``function`` must be importable by name and its result plain data.
    """
    port = require_free_port("127.0.0.1", 0, named="127.0.0.1")
    given = (workers, port, function, arguments, str(folder), dict(os.environ))
    mp.start_processes(_rank, given, nprocs=workers, start_method=forkserver().get_start_method())
    results = [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(workers)]  # noqa: S301
    for kind, value in results:
        if kind == "error":
            raise AssertionError(value)
    return [value for _, value in results]


def _rank(
    rank: int,
    workers: int,
    port: int,
    function: Callable,
    arguments: tuple,
    folder: str,
    environment: dict[str, str],
) -> None:
    # The caller's as it is now.
    os.environ.clear()
    os.environ.update(environment, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    try:
        result = ("value", function(*arguments))
    except Exception:  # noqa: BLE001  (handed to the test)
        result = ("error", traceback.format_exc())
    Path(folder, f"rank-{rank}").write_bytes(pickle.dumps(result))
    if result[0] == "value":
        dist.barrier()
    dist.destroy_process_group()
    # Meshes keep their groups alive, so gloo's threads still run; one of them that drops a tensor while the
    # interpreter ends aborts the process. The result is on disk: leave without ending the interpreter.
    os._exit(0)
