"""How much tensor memory a call takes, and what for."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from lossworks.adapters.torch_private import TorchDispatchMode, storage_key, tree_leaves

EXCHANGE = "exchange between workers"
"""Label of what is sent to and received from other ranks."""

_EXCHANGING = ("c10d", "fsdp")  # namespaces of operators


class TensorMemory(TorchDispatchMode):
    """Follows the storages that operators return until they are freed, forward and backward.

    What an operator takes and gives back inside is not seen. It is exact and repeatable, unlike the process's
    resident memory. On fake and meta tensors it counts what real ones would take.

    Attributes:
        live: Bytes that are alive, by label.
        peak: The same, when they were most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._label = ""
        self._storages: dict[int, tuple[int, str]] = {}
        self._total = 0
        self._most = 0

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Put what is made inside down to a label, in place of the one around it."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    def relabel(self, tensor: Tensor, label: str) -> None:
        """Put what was counted of a tensor, or of this rank's part of it, down to another label."""
        key = storage_key(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        if key in self._storages:
            size, before = self._storages[key]
            self._storages[key] = size, label
            self._count(before, -size)
            self._count(label, size)

    def forget_peak(self) -> None:
        """Look for the peak anew from here on."""
        self._most, self.peak = self._total, Counter(self.live)

    def __enter__(self) -> Self:
        """Begin to follow; a storage that is given another size is counted anew."""
        self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            found = self._resize(storage, size)
            self._resized(storage)
            return found

        # It is no operator, so that nothing else tells.
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """Follow no longer."""
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and count the storages it made."""
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # DTensors: their own operators on what they are made of come by
        given = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        inputs = {storage_key(leaf.untyped_storage()) for leaf in given}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        for leaf in made:
            if storage_key(leaf.untyped_storage()) not in inputs:
                self._follow(leaf.untyped_storage())
        if func.namespace in _EXCHANGING:
            for leaf in (*given, *made):
                self._exchanged(leaf)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages[key] = size, self._label
        self._count(self._label, size)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        size, label = self._storages.pop(key)
        self._count(label, -size)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = storage_key(storage)
        if key in self._storages:
            before, label = self._storages[key]
            self._storages[key] = storage.nbytes(), EXCHANGE
            self._count(label, -before)
            self._count(EXCHANGE, storage.nbytes())

    def _exchanged(self, tensor: Tensor) -> None:
        """Put a buffer down to the exchange that it is made for, unless it was there before."""
        _, label = self._storages.get(storage_key(tensor.untyped_storage()), (0, ""))
        if label == self._label:
            self.relabel(tensor, EXCHANGE)

    def _count(self, label: str, size: int) -> None:
        self.live[label] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, Counter(self.live)


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes of tensors that ``call`` had alive at once, beyond what existed before.

    See :class:`TensorMemory` for what is seen and what is not.
    """
    memory = TensorMemory()
    with memory:
        call()
    return memory.peak.total()
