"""How much tensor memory a call takes."""

import weakref
from collections.abc import Callable
from typing import Any

import torch

from lossworks.adapters.torch_private import TorchDispatchMode, storage_key, tree_leaves


class _Watch(TorchDispatchMode):
    """Follows the storages that operators return until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages it made."""
        inputs = {
            storage_key(leaf.untyped_storage())
            for leaf in tree_leaves((args, kwargs))
            if torch.is_tensor(leaf)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and storage_key(leaf.untyped_storage()) not in inputs:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of tensors that ``call`` had alive at once, beyond what existed before.

    Every operator's results are followed until they are freed, forward and backward; what an operator takes
    and gives back inside is not seen. It is exact and repeatable, unlike the process's resident memory.
    """
    watch = _Watch()
    with watch:
        call()
    return watch.peak
