"""Sharded checkpoints: written atomically, checked before use, the newest k and the best kept."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lossworks.errors import RunError, StorageError, redact
from lossworks.training.checkpoints.manifest import (
    MANIFEST,
    UNREADABLE,
    Checkpoint,
    best_of,
    checkpoint_name,
    find_damage,
    read_checkpoint,
    superfluous,
    write_manifest,
)
from lossworks.training.checkpoints.shard_reader import PlainValuePlanner, ShardReader
from lossworks.training.distributed.world import World

if TYPE_CHECKING:
    from lossworks.training.checkpoints.mirror import CheckpointMirror

_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0


@dataclass(frozen=True)
class _Facts:
    """What a manifest says besides its files."""

    step: int
    position: int
    held_out_loss: float


class CheckpointStore:
    """The checkpoints of one run, in a folder that all ranks share.

    ``torch.distributed.checkpoint`` writes every rank's shard into a hidden folder; then rank 0 adds a
    manifest with each file's size and SHA-256 and renames the folder, so that a checkpoint either is complete
    or does not exist. Schedule and random streams are functions of the step and the data order is one of the
    position, so step and position say all about them, at any number of ranks.

    Args:
        folder: Where the checkpoints are.
        keep: Newest checkpoints that stay.
        patience_s: Seconds to try again while storage refuses.
        notify: Called by rank 0 with a sentence that a person should see.
        mirror: Where whole checkpoints are copied by rank 0; None for nowhere.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        patience_s: float = 0.0,
        notify: Callable[[str], object] = str,
        mirror: "CheckpointMirror | None" = None,
    ) -> None:
        self.folder = folder
        self.mirror = mirror
        self.keep = keep
        self.patience_s = patience_s
        self._notify = notify
        self._stager: Any = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")  # which starts with the first that it is given

    def save(
        self,
        model: nn.Module,
        optimizer: Any,
        world: World,
        *,
        step: int,
        position: int,
        held_out_loss: float,
        further: Mapping[str, Any] | None = None,
        stays: int | None = None,
    ) -> Path:
        """Write a checkpoint from all ranks and return its folder; every rank calls this.

        While storage refuses it is tried again, for ``patience_s`` seconds.

        Args:
            model: What is trained.
            optimizer: Its optimiser, or all of them.
            world: The ranks.
            step: Optimiser steps done.
            position: Rows consumed so far, over all ranks.
            held_out_loss: At this step.
            further: Tensors by name, nested, of what else has a state, such as companions and methods.
            stays: Step of a checkpoint that stays besides the newest and the best.

        Raises:
            StorageError: On every rank: storage still refuses; the checkpoints before stay as they were.
        """
        facts = _Facts(step, position, held_out_loss)
        return self._write(_state(model, optimizer, further), world, facts, stays)

    def save_meanwhile(
        self,
        model: nn.Module,
        optimizer: Any,
        world: World,
        *,
        step: int,
        position: int,
        held_out_loss: float,
        further: Mapping[str, Any] | None = None,
        stays: int | None = None,
    ) -> "Future[Path]":
        """Copy the state and let a thread write it; every rank calls this, after the last one has ended.

        Args:
            model: As for :meth:`save`, like all that follow but for ``world``.
            optimizer: As there.
            world: The ranks in a group of their own, :meth:`World.apart`.
            step: As there.
            position: As there.
            held_out_loss: As there.
            further: As there.
            stays: As there.

        Returns:
            What :meth:`save` returns or raises, once it has; it ends alike on all ranks.
        """
        if self._stager is None:
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

            # Its copy stays, so that only the first one is made in new memory.
            self._stager = DefaultStager(StagingOptions(*(False,) * 4))
        copied = self._stager.stage(_state(model, optimizer, further))
        facts = _Facts(step, position, held_out_loss)
        return self._thread.submit(self._write, copied, world, facts, stays)

    def _write(self, state: Mapping[str, Any], world: World, facts: _Facts, stays: int | None) -> Path:
        final = self.folder / checkpoint_name(facts.step)

        def copy() -> str | None:
            mirror = self.mirror if world.leads else None
            return world.first(_problem(lambda: mirror.copy(final, self.keep, stays)) if mirror else None)

        problem = self._tried(lambda: self._try(state, world, facts, stays), world, facts.step)
        if problem is not None:
            raise StorageError(
                f"step {facts.step}: the checkpoint in {self.folder} can't be written: {problem}; "
                f"{_free(self.folder)}; the checkpoints before are as they were"
            )
        if self.mirror is not None and (problem := self._tried(copy, world, facts.step)) is not None:
            raise StorageError(
                f"step {facts.step}: the checkpoint can't be copied to {redact(self.mirror.url)}: {problem}; "
                f"it is whole in {final}"
            )
        return final

    def _tried(self, attempt: Callable[[], str | None], world: World, step: int) -> str | None:
        """Try something, again where it fails; return what it still meets with when patience has ended.

        Args:
            attempt: Called by all ranks; returns None, or what some rank met with, the same on every rank.
            world: The ranks.
            step: Of the checkpoint.
        """
        began, pause = time.monotonic(), _PAUSE_S
        while (problem := attempt()) is not None:
            left = world.agree(self.patience_s - (time.monotonic() - began))
            if left <= 0:
                return problem
            if world.leads and pause == _PAUSE_S:
                self._notify(f"step {step}: storage refuses the checkpoint ({problem}); trying again")
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return None

    def _try(self, state: Mapping[str, Any], world: World, facts: _Facts, stays: int | None) -> str | None:
        """Write a checkpoint; return what some rank met with, the same text on every rank, or None."""
        partial = self.folder / f".{checkpoint_name(facts.step)}.partial"
        problem = world.first(_problem(lambda: _make_empty(partial)) if world.leads else None)
        if problem is None:
            problem = world.first(_problem(lambda: _write_shards(state, partial, world)))
        if problem is None:
            problem = world.first(
                _problem(lambda: self._complete(partial, facts, stays)) if world.leads else None
            )
        if problem is not None and world.leads:
            shutil.rmtree(partial, ignore_errors=True)  # what is left of it takes room
        return problem

    def _complete(self, partial: Path, facts: _Facts, stays: int | None) -> None:
        """Turn the folder that all ranks have written into a checkpoint."""
        write_manifest(partial, **vars(facts))
        _replace(partial, self.folder / checkpoint_name(facts.step))
        self._prune(stays)

    def load(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        optimizer: Any,
        further: Mapping[str, Any] | None = None,
    ) -> None:
        """Restore model and optimiser, whatever the number of ranks that wrote them.

        Args:
            checkpoint: A whole one.
            model: What is trained.
            optimizer: Its optimiser, or all of them.
            further: Tensors that are filled in place; as they were given to ``save``.
        """
        state = _state(model, optimizer, further)
        load_shards(state, checkpoint.folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def newest(self, until: int | None = None) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that is whole, and what is wrong with those passed over.

        If the mirror has a newer one, it is fetched, and so is the best one.

        Args:
            until: The last step that it may be of; None for any.

        Raises:
            StorageError: The mirror can't be read.
        """
        here, complaints = self._newest_here(until)
        if self.mirror is None:
            return here, complaints
        try:
            fetched = self._fetch(self.mirror, -1 if here is None else here.step, until, complaints)
        except OSError as error:
            raise StorageError(f"{redact(self.mirror.url)}: can't be read: {error}") from None
        return fetched or here, complaints

    def _fetch(
        self, mirror: "CheckpointMirror", than: int, until: int | None, complaints: list[str]
    ) -> Checkpoint | None:
        """Fetch what a mirror has after a step, the best one, too; return the newest that is whole, or None.

        Complaints are added about those that are not.
        """
        for newer in mirror.newer(than):
            if until is not None and newer.step > until:
                continue
            if (found := self._fetched(mirror, newer.folder.name, complaints)) is not None:
                best = mirror.best()
                if best is not None and not (self.folder / best.folder.name).exists():
                    self._fetched(mirror, best.folder.name, complaints)
                return found
        return None

    def _fetched(self, mirror: "CheckpointMirror", name: str, complaints: list[str]) -> Checkpoint | None:
        partial = self.folder / f".{name}.partial"
        _make_empty(partial)
        mirror.fetch(name, partial)
        if (damage := find_damage(partial)) is not None:
            shutil.rmtree(partial)
            complaints.append(f"checkpoint {name} in {redact(mirror.url)} is damaged ({damage})")
            return None
        _replace(partial, self.folder / name)
        return read_checkpoint(self.folder / name)

    def _newest_here(self, until: int | None) -> tuple[Checkpoint | None, list[str]]:
        complaints: list[str] = []
        for folder in sorted(self._folders(), reverse=True):
            if until is not None and folder.name > checkpoint_name(until):
                continue
            problem = find_damage(folder)
            if problem is None:
                return read_checkpoint(folder), complaints
            complaints.append(f"checkpoint {folder.name} is damaged ({problem})")
        return None, complaints

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the least held-out loss, without checking its files."""
        return best_of(self._readable())

    def _readable(self) -> list[Checkpoint]:
        """Return the checkpoints whose manifests can be read."""
        found = []
        for folder in self._folders():
            with contextlib.suppress(*UNREADABLE):
                found.append(read_checkpoint(folder))
        return found

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if (path / MANIFEST).is_file()]

    def _prune(self, stays: int | None) -> None:
        names = [folder.name for folder in self._folders()]
        for name in superfluous(names, self._readable(), self.keep, stays):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def load_shards(state: dict[str, Any], folder: Path) -> None:
    """Fill the tensors of ``state``, sharded or whole, from a checkpoint's files.

    Every rank calls this, or a single process without a group.

    Raises:
        RunError: The files don't hold the state, or something that could run code; nothing of it ran.
    """
    reader = ShardReader(folder)
    reader.read_metadata()  # refused here it is one sentence; within torch's loading, a traceback a rank
    try:
        with _without_group_warning():
            dcp.load(state, storage_reader=reader, planner=PlainValuePlanner())
    except dcp.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise RunError(f"{folder}: can't be loaded: {reason}") from error


def tensors_in(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint whose names begin with a prefix, whole and without it.

    Raises:
        RunError: The files can't be read.
    """
    stored = ShardReader(folder).read_metadata().state_dict_metadata
    wanted = {
        name.removeprefix(prefix): torch.empty(found.size, dtype=found.properties.dtype)
        for name, found in stored.items()
        if name.startswith(prefix) and isinstance(found, TensorStorageMetadata)
    }
    if wanted:
        load_shards({prefix.removesuffix("."): wanted}, folder)
    return wanted


@contextlib.contextmanager
def _without_group_warning() -> Iterator[None]:
    """Hide the warning that a process on its own, without a process group, is taken to be alone: it is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield


def _problem(work: Callable[[], None]) -> str | None:
    """Do something with storage; return what went wrong, in one line, or None."""
    try:
        work()
    except (OSError, dcp.CheckpointException) as error:
        cause: BaseException = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        return " ".join(str(cause).split()) or type(cause).__name__
    return None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _state(model: nn.Module, optimizer: Any, further: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the tensors of a checkpoint, which are those that are trained."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state, **(further or {})}


def _write_shards(state: Mapping[str, Any], folder: Path, world: World) -> None:
    with _without_group_warning():
        dcp.save(dict(state), checkpoint_id=folder, process_group=world.group)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return f"it can't be reached: {error.strerror}"


def _replace(partial: Path, final: Path) -> None:
    """Rename a complete folder into place; a damaged one of that name, passed over earlier, goes."""
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
