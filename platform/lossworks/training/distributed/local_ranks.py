"""Processes of this machine that work together over gloo, without Ray."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_local_ranks(
    ranks: int, function: Callable[..., object], *arguments: Any, imports: Sequence[str] = ()
) -> None:
    """Call ``function(*arguments)`` in new processes of one group, with one thread each, and wait for them.

    Args:
        ranks: How many processes there are.
        function: Importable by name. What it returns is lost; what it finds it writes to a file.
        arguments: Plain data.
        imports: Modules that are imported once for all processes, where those are forked from one that waits;
            it keeps those that it is first given. The function's own module if empty.

    Raises:
        ProcessRaisedException: Of torch: the function raised in some rank. The others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (ranks, f"file://{folder}/meeting", function, arguments)
        method = _start_method(imports or [function.__module__])
        mp.start_processes(_rank, given, nprocs=ranks, start_method=method)


def _start_method(imports: Sequence[str]) -> str:
    """Return how ranks start: forked, where that can be, from a process that has imported what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(list(imports))
    return "forkserver"


def _rank(
    rank: int, ranks: int, meeting: str, function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # They meet in a file: a free port might be taken before they are there.
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    function(*arguments)
    dist.barrier()
    # Meshes keep their groups alive, so gloo's threads still run; one of them that drops a tensor while the
    # interpreter ends aborts the process. What is found is on disk: leave without ending the interpreter.
    os._exit(0)
