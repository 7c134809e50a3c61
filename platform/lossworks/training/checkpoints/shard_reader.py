"""Read a sharded checkpoint without running code from it.

``torch.distributed.checkpoint`` keeps its table of contents (``.metadata``) and every value that is no tensor
as pickles, and reads them as such, so a planted file could run anything. Here the table of contents may name
nothing but its own classes, values are read with ``weights_only``, and shards lie in the checkpoint's folder.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import ReadItem

from lossworks.adapters.torch_private import memory_format_enum
from lossworks.errors import RunError

_TABLE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_TABLE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_TABLE, f"{name}StorageMetadata") for name in ("Bytes", "Chunk", "Tensor")),
    (_TABLE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    # Where the checkpoint was written; Python 3.13 keeps the class elsewhere.
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
}

# What reading a pickle that is damaged, cut short or not one of ours ends in.
_UNREADABLE = (pickle.UnpicklingError, OSError, EOFError, AttributeError, LookupError, TypeError, ValueError)


class ShardReader(FileSystemReader):
    """torch's reader of a checkpoint's folder, with a table of contents that can't run code."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the table of contents.

        Raises:
            RunError: It can't be read, names anything but its own classes, or points out of the folder.
        """
        path = Path(self.path, ".metadata")
        try:
            with path.open("rb") as file:
                table = _Unpickler(file).load()
        except _UNREADABLE as error:
            raise RunError(f"{path}: is no table of contents of a checkpoint: {error}") from None
        if not isinstance(table, Metadata) or not isinstance(table.storage_data, dict):
            raise RunError(f"{path}: is no table of contents of a checkpoint")
        for stored in table.storage_data.values():
            if Path(stored.relative_path).name != stored.relative_path:
                raise RunError(f"{path}: names {stored.relative_path}, which is no file beside it")
        return table


class PlainValuePlanner(DefaultLoadPlanner):
    """torch's way of filling a state, with values that are numbers, text, tensors, or lists of these."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put one value that is no tensor into the state.

        Raises:
            RunError: It is of another kind.
        """
        name = read_item.dest_index.fqn
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            raise RunError(f"{name}: holds an object instead of a plain value; it was not loaded") from None
        # torch's own method reads any pickle, so it gets one that was written here.
        copy = io.BytesIO()
        torch.save(plain, copy)
        copy.seek(0)
        super().load_bytes(read_item, copy)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of a table of contents, and no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # how some Pythons pickle the member of an enum
        if (module, name) in _ALLOWED or _is_dtype(module, name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}")


def _is_dtype(module: str, name: str) -> bool:
    return module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)


def _member(kind: Any, name: str) -> Any:
    """Return a member of the one enum that a table of contents holds."""
    if kind is not memory_format_enum():
        raise pickle.UnpicklingError(f"names an attribute of {kind}")
    return kind[name]
