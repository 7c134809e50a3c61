"""A checkpoint's manifest: what it is a checkpoint of, and its files with sizes and SHA-256."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""Name of the file; a folder without it is no checkpoint."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged manifest ends in."""


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


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder; names are in the order of steps."""
    return f"step-{step:08d}"


def write_manifest(folder: Path, *, step: int, position: int, held_out_loss: float) -> None:
    """Make a checkpoint of a folder whose other files are complete."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"step": step, "position": position, "held_out_loss": str(held_out_loss), "files": files}
    with (folder / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Return what a checkpoint's manifest says."""
    return parse_manifest((folder / MANIFEST).read_bytes(), folder)


def parse_manifest(content: bytes, folder: Path) -> Checkpoint:
    """Return what a manifest says of a checkpoint in ``folder``; may raise any of :data:`UNREADABLE`."""
    manifest = json.loads(content)
    return Checkpoint(folder, manifest["step"], manifest["position"], float(manifest["held_out_loss"]))


def files_named(content: bytes) -> Mapping[str, Mapping[str, Any]]:
    """Return ``bytes`` and ``sha256`` of each file that a manifest names.

    Raises:
        ValueError: One of them is no file beside the manifest.
    """
    files: Mapping[str, Mapping[str, Any]] = json.loads(content)["files"]
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{name}: is no file beside {MANIFEST}")
    return files


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint's files, or None if all are as they were written."""
    try:
        files = files_named((folder / MANIFEST).read_bytes())
        read_checkpoint(folder)
    except UNREADABLE:
        return f"{MANIFEST} can't be read"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(path) != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def best_of(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the one with the least held-out loss, or None where none has a finite one."""
    finite = [one for one in checkpoints if math.isfinite(one.held_out_loss)]
    return min(finite, key=lambda one: one.held_out_loss, default=None)


def superfluous(
    names: Iterable[str], known: Sequence[Checkpoint], keep: int, stays: int | None = None
) -> list[str]:
    """Return the names of checkpoints that go.

    Args:
        names: Of all there are.
        known: Those whose manifests can be read; the best one of them stays.
        keep: How many newest stay.
        stays: Step of one that stays besides; None for none.
    """
    best = best_of(known)
    kept = {best.folder.name if best else "", "" if stays is None else checkpoint_name(stays)}
    return [name for name in sorted(names)[:-keep] if name not in kept]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
