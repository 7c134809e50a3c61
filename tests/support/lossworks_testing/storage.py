"""Storage that refuses for real: the kernel's limit on the size of a process's files."""

import resource
import threading

import torch
from torch import nn

from lossworks.errors import StorageError
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.distributed.world import World


def limit_files(size):
    """Let this process write files of at most so many bytes; the kernel refuses further writes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


def save_under_limit(folder, limited_ranks, lifted_after_s, patience_s):
    """Save once freely and once with some ranks under a limit; return errors and notices as plain data."""
    torch.manual_seed(0)
    world, notices = World.current(), []
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    store = CheckpointStore(folder, keep=2, patience_s=patience_s, notify=notices.append)
    place = {"position": 0, "held_out_loss": 1.0}
    store.save(model, optimizer, world, step=1, **place)
    if world.rank in limited_ranks:
        limit_files(4096)
    lift = threading.Timer(lifted_after_s or 0, limit_files, [None])
    if lifted_after_s:
        lift.start()
    try:
        store.save(model, optimizer, world, step=2, **place)
    except StorageError as error:
        return {"error": str(error), "notices": notices}
    finally:
        lift.cancel()
        limit_files(None)
    return {"error": None, "notices": notices}
