"""Sharded checkpoints: written atomically, checked before use, the newest k and the best kept."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lossworks.errors import RunError
from lossworks.training.world import World

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on storage.

    Attributes:
        folder: Holds one file a rank, their metadata and the manifest.
        step: Optimiser steps done.
        position: Sequences consumed so far, over all ranks.
        held_out_loss: Nats a token on held-out text at that step.
    """

    folder: Path
    step: int
    position: int
    held_out_loss: float


class CheckpointStore:
    """The checkpoints of one run, in a folder that all ranks share.

    ``torch.distributed.checkpoint`` writes every rank's shard into a hidden folder; then rank 0 adds a
    manifest with each file's size and SHA-256 and renames the folder, so that a checkpoint either is complete
    or does not exist. Schedule and random streams are functions of the step and the data order is one of the
    position, so step and position say all about them, at any number of ranks.
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(
        self,
        model: nn.Module,
        optimizer: Any,
        world: World,
        *,
        step: int,
        position: int,
        held_out_loss: float,
    ) -> Path:
        """Write a checkpoint from all ranks and return its folder.

        Raises:
            RunError: Storage is full or refuses; the checkpoints before stay as they were.
        """
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.partial"
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        world.barrier()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        try:
            with _without_group_warning():
                dcp.save(state, checkpoint_id=partial)
        except (OSError, dcp.CheckpointException) as error:
            raise RunError(
                f"step {step}: the checkpoint in {self.folder} can't be written: {error}"
            ) from error
        if world.leads:
            _write_manifest(partial, step=step, position=position, held_out_loss=held_out_loss)
            _replace(partial, final)
            self._prune()
        world.barrier()
        return final

    def load(self, checkpoint: Checkpoint, model: nn.Module, optimizer: Any) -> None:
        """Restore model and optimiser, whatever the number of ranks that wrote them."""
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
        load_shards(state, checkpoint.folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that is whole, and what is wrong with those passed over."""
        complaints: list[str] = []
        for folder in sorted(self._folders(), reverse=True):
            problem = find_damage(folder)
            if problem is None:
                return read_checkpoint(folder), complaints
            complaints.append(f"checkpoint {folder.name} is damaged ({problem})")
        return None, complaints

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the least held-out loss, without checking its files."""
        known = [read_checkpoint(folder) for folder in self._folders()]
        finite = [item for item in known if math.isfinite(item.held_out_loss)]
        return min(finite, key=lambda item: item.held_out_loss, default=None)

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if (path / _MANIFEST).is_file()]

    def _prune(self) -> None:
        folders = sorted(self._folders())
        best = self.best()
        for folder in folders[: -self.keep]:
            if best is None or folder != best.folder:
                shutil.rmtree(folder, ignore_errors=True)


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of ``state``, sharded or whole, from a checkpoint's files.

    Every rank calls this, or a single process without a group.
    """
    with _without_group_warning():
        dcp.load(state, checkpoint_id=folder)


@contextlib.contextmanager
def _without_group_warning() -> Iterator[None]:
    """Hide the warning that a process on its own, without a process group, is taken to be alone: it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what a checkpoint's manifest says."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    loss = float(manifest["held_out_loss"])
    return Checkpoint(folder, manifest["step"], manifest["position"], loss)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if all are as they were written."""
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"{_MANIFEST} can't be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def _write_manifest(folder: Path, *, step: int, position: int, held_out_loss: float) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"step": step, "position": position, "held_out_loss": str(held_out_loss), "files": files}
    with (folder / _MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(partial: Path, final: Path) -> None:
    """Rename a complete folder into place; a damaged one of that name, passed over earlier, goes."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
