"""Checkpoints that are written while training goes on, by a storage that is slow or refuses."""

import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lossworks.errors import StorageError
from lossworks.specs import read_yaml
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints import checkpoint
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.job import Job
from lossworks.training.loop import Trainer, train
from lossworks_testing.storage import limit_files
from lossworks_testing.training import prepared


def slow_down(seconds: float) -> None:
    """Let every checkpoint of this process take so long, with its files half written."""
    write = checkpoint._write_shards

    def slowly(state: Any, folder: Path, world: Any) -> None:
        (folder / "half").write_bytes(b"0" * 1000)
        time.sleep(seconds)
        (folder / "half").unlink()
        write(state, folder, world)

    checkpoint._write_shards = slowly


def train_while_storage_refuses(values: dict[str, Any], corpus: str, folder: str) -> dict[str, Any]:
    """Train where the last rank can't write any checkpoint but the first; return error and steps taken.

    The kernel refuses: what another exception would end early on one rank leaves the others waiting.
    """
    write, calls = checkpoint._write_shards, []

    def refused(state: Any, folder: Path, world: Any) -> None:
        calls.append(folder)
        if len(calls) > 1 and dist.get_rank() == dist.get_world_size() - 1:
            limit_files(4096)
        write(state, folder, world)

    checkpoint._write_shards = refused
    spec = parse_train_spec(values)
    trainer = Trainer(Job(spec, Path(corpus), CheckpointStore(Path(folder), keep=2), lambda *_: None))
    try:
        trainer.run()
    except StorageError as error:
        return {"error": str(error), "step": trainer.step}
    finally:
        checkpoint._write_shards = write
        limit_files(None)
    return {"error": None, "step": trainer.step}


def main() -> None:
    """Train the spec of a file into a folder, each checkpoint taking seconds; print every step."""
    file, folder, seconds = sys.argv[1:]
    slow_down(float(seconds))
    spec = parse_train_spec(read_yaml(Path(file)))
    store = CheckpointStore(Path(folder), keep=99)
    train(Job(spec, prepared(spec).folder, store, lambda step, _: print(step, flush=True)))


if __name__ == "__main__":
    main()
