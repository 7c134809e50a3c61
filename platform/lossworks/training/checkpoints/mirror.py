"""Copies of whole checkpoints in an object store, such as S3, which fsspec reaches."""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lossworks.errors import UserError, redact, shortened
from lossworks.home import runs_folder
from lossworks.logs import Secrets
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tasks import read_train_spec
from lossworks.training.checkpoints.manifest import (
    MANIFEST,
    Checkpoint,
    best_of,
    files_named,
    parse_manifest,
    superfluous,
)

_RUN = "run"  # folder of what a run needs besides checkpoints
_SPEC = "spec.yaml"


class CheckpointMirror:
    """The whole checkpoints of a run in an object store, and what else going on elsewhere needs.

    Checkpoints are written to the folder that all ranks share, as without a mirror; those that are whole are
    then copied here, the manifest last, so that one without a manifest isn't there. Those that are no longer
    kept go, the manifest first. One process at a time writes here.

    Args:
        url: Address of the run's folder in the store, such as ``s3://bucket/prefix/RUN``.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @classmethod
    def of(cls, spec: RunSpec, run_id: str) -> "CheckpointMirror | None":
        """Return the mirror of a run, or None of a run without one."""
        return cls(f"{spec.checkpoint.mirror.rstrip('/')}/{run_id}") if spec.checkpoint.mirror else None

    @staticmethod
    def check(spec: RunSpec) -> None:
        """Write, read and remove a small object where mirrors of runs go, if there are to be any.

        Raises:
            UserError: That can't be done, and why.
        """
        url = spec.checkpoint.mirror
        if url is None:
            return
        content = uuid.uuid4().hex
        try:
            with _reached(url) as (store, root):
                probe = f"{root}/.probe-{content}"
                store.pipe_file(probe, content.encode())
                found = store.cat_file(probe)
                store.rm(probe)
                if found != content.encode():
                    raise OSError("what was written is not what is read")
        except OSError as error:
            raise UserError(f"checkpoint.mirror={redact(url)}: can't be used: {error}") from None

    def keep_run(self, folder: RunFolder) -> None:
        """Copy a run's spec and what it has learnt of its data.

        Raises:
            UserError: The store refuses.
        """
        try:
            with _reached(self.url) as (store, root):
                store.put_file(str(folder.spec_file), f"{root}/{_RUN}/{_SPEC}")
                for file in sorted(folder.learnt.glob("*")):
                    store.put_file(str(file), f"{root}/{_RUN}/{folder.learnt.name}/{file.name}")
        except OSError as error:
            raise UserError(f"checkpoint.mirror: {redact(self.url)} can't be written: {error}") from None

    def run_here(self) -> RunFolder:
        """Return the run's folder on this machine, made of what the store has if it isn't there yet.

        Raises:
            UserError: The store refuses, or there is no such run.
        """
        run_id = self.url.rpartition("/")[2]
        if run_id in ("", ".", ".."):
            raise UserError(f"run {redact(self.url)}: must end with the id of a run")
        try:
            with _reached(self.url) as (store, root), tempfile.TemporaryDirectory() as temporary:
                file = Path(temporary, _SPEC)
                store.get_file(f"{root}/{_RUN}/{_SPEC}", str(file))
                spec = read_train_spec(file)
                folder = RunFolder((Path(spec.storage) if spec.storage else runs_folder()) / run_id)
                if folder.spec_file.exists():
                    return folder
                folder.learnt.mkdir(parents=True, exist_ok=True)
                for name in _names(store, f"{root}/{_RUN}/{folder.learnt.name}"):
                    path = f"{root}/{_RUN}/{folder.learnt.name}/{name}"
                    store.get_file(path, str(folder.learnt / name))
                folder.store(spec)
                return folder
        except OSError as error:
            raise UserError(f"run {redact(self.url)}: can't be read: {error}") from None

    def copy(self, folder: Path, keep: int, stays: int | None = None) -> None:
        """Copy a whole checkpoint, and remove those that are not kept.

        Args:
            folder: Of the checkpoint.
            keep: Newest checkpoints that stay, besides the best.
            stays: Step of one that stays as well; None for none.

        Raises:
            OSError: The store refuses.
        """
        with _reached(self.url) as (store, root):
            target = f"{root}/{folder.name}"
            if store.exists(f"{target}/{MANIFEST}"):
                store.rm(f"{target}/{MANIFEST}")  # of a damaged one, which this one replaces
            for name, expected in files_named((folder / MANIFEST).read_bytes()).items():
                store.put_file(str(folder / name), f"{target}/{name}")
                if store.size(f"{target}/{name}") != expected["bytes"]:
                    raise OSError(f"{name} did not arrive whole")
            store.put_file(str(folder / MANIFEST), f"{target}/{MANIFEST}")
            self._prune(store, root, keep, stays)

    def newer(self, than: int) -> list[Checkpoint]:
        """Return the checkpoints after a step, the newest first; their folders are names alone.

        Raises:
            OSError: The store refuses.
        """
        with _reached(self.url) as (store, root):
            known = self._known(store, root)
        return sorted((one for one in known if one.step > than), key=lambda one: -one.step)

    def best(self) -> Checkpoint | None:
        """Return the one with the least held-out loss; its folder is a name alone.

        Raises:
            OSError: The store refuses.
        """
        with _reached(self.url) as (store, root):
            return best_of(self._known(store, root))

    def fetch(self, name: str, into: Path) -> None:
        """Copy a checkpoint's files into an empty folder; whether they are whole is not looked at.

        Raises:
            OSError: The store refuses, or the manifest can't be read.
        """
        with _reached(self.url) as (store, root):
            manifest = store.cat_file(f"{root}/{name}/{MANIFEST}")
            for file in files_named(manifest):
                store.get_file(f"{root}/{name}/{file}", str(into / file))
            (into / MANIFEST).write_bytes(manifest)

    def _known(self, store: Any, root: str) -> list[Checkpoint]:
        found = []
        for name in _names(store, root):
            if name.startswith("step-") and store.exists(f"{root}/{name}/{MANIFEST}"):
                with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
                    content = store.cat_file(f"{root}/{name}/{MANIFEST}")
                    found.append(parse_manifest(content, Path(name)))
        return found

    def _prune(self, store: Any, root: str, keep: int, stays: int | None) -> None:
        """Remove what is not kept, and what a process that was killed left unfinished."""
        known = self._known(store, root)
        names = [one.folder.name for one in known]
        gone = superfluous(names, known, keep, stays)
        for name in gone:
            store.rm(f"{root}/{name}/{MANIFEST}")
        unfinished = [name for name in _names(store, root) if name.startswith("step-") and name not in names]
        for name in (*gone, *unfinished):
            store.rm(f"{root}/{name}", recursive=True)


def _names(store: Any, path: str) -> list[str]:
    """Return the names of what lies in a folder of a store; none where there is no such folder."""
    store.invalidate_cache()
    try:
        return sorted(str(found).rstrip("/").rpartition("/")[2] for found in store.ls(path, detail=False))
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _reached(url: str) -> Iterator[tuple[Any, str]]:
    """Yield a store and the path that an address names in it.

    Raises:
        OSError: Whatever the store's library meets with, in one line without secrets.
    """
    import fsspec
    from fsspec.registry import known_implementations

    scheme = url.partition("://")[0]
    try:
        # Only folders have to be made; a store asked for one might make a bucket.
        options = {"auto_mkdir": True} if scheme == "file" else {}
        store, root = fsspec.core.url_to_fs(url, **options)
        yield store, str(root).rstrip("/")
    except ImportError as error:
        package = str(known_implementations.get(scheme, {}).get("class", "")).partition(".")[0]
        hint = f": pip install {package}" if package not in ("", "fsspec") else ""
        raise OSError(f"{error}{hint}") from error
    except Exception as error:  # stores' libraries raise what they like
        said = " ".join(str(error).split())
        named = said if isinstance(error, OSError) and said else f"{type(error).__name__}: {said}"
        raise OSError(shortened(str(Secrets.of(os.environ).hide(named)))) from error
