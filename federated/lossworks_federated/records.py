"""Between Flower's records and tensors by name."""

from collections.abc import Iterable, Mapping
from io import BytesIO
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict

from lossworks.cohort import Member
from lossworks.errors import RunError

MODEL, CONFIG, METRICS = "arrays", "config", "metrics"
"""Records of a message: parameters, configuration, metrics. A method's further arrays are under its slug."""


_DTYPES = {np.dtype(name): name for name in ("float32", "float64", "int64")}  # naming one takes microseconds


def part_mark(slug: str) -> str:
    """Return the metric by which a client says that it did a strategy's part, 1."""
    return f"part/{slug}"


class LocalArray(Array):
    """An array that stays in this process: it is serialised only if somebody asks for its bytes.

    Args:
        values: What it holds; not copied.
    """

    def __init__(self, values: np.ndarray) -> None:
        name = _DTYPES.get(values.dtype) or str(values.dtype)
        self.__dict__.update(dtype=name, shape=values.shape, stype="numpy.ndarray", values=values)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """Bytes in numpy's format."""
        buffer = BytesIO()
        np.save(buffer, self.__dict__["values"], allow_pickle=False)
        return buffer.getvalue()

    def numpy(self) -> np.ndarray:
        """Return the values in their own shape, without a copy."""
        values: np.ndarray = self.__dict__["values"]
        return values


def array_record(member: Mapping[str, torch.Tensor], *, local: bool = False) -> ArrayRecord:
    """Return tensors as a record.

    Args:
        member: Tensors by name, of any shape and dtype.
        local: Whether the record stays in this process and so needs no bytes; it then shares memory.
    """
    record = ArrayRecord()
    if local:
        # Past the checks of keys and values, which take longer than all else and can't fail here.
        record.__dict__["_data"] = {name: LocalArray(value.numpy()) for name, value in member.items()}
        return record
    for name, value in member.items():
        record[name] = Array(value.detach().cpu().numpy())
    return record


def member_from(record: ArrayRecord) -> Member:
    """Return a record as tensors; those of records that stay in this process share memory."""
    return {name: _tensor(array.numpy()) for name, array in record.items()}


def model_from(content: RecordDict, own: Member) -> Member:
    """Return the model of an instruction in the dtypes of a client's own.

    Strategies may send others, as Flower's FedAdam does, which gives float64 whatever it was given.

    Args:
        content: The instruction.
        own: A model of the client, for its names, shapes and dtypes.

    Raises:
        RunError: The instruction holds no model, or another one.
    """
    record: Mapping[str, Array] = content.array_records.get(MODEL, {})
    wrong = unlike(_shapes(record), {name: tuple(value.shape) for name, value in own.items()})
    if wrong:
        raise RunError(f"the instruction's record {MODEL!r} is no model of this client: {wrong}")
    return {name: _tensor(record[name].numpy()).to(value.dtype) for name, value in own.items()}


def unlike(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """Return in words the first difference of arrays' names and shapes from those expected; empty if none."""
    if missing := [name for name in expected if name not in found]:
        return f"{missing[0]} is missing"
    if further := [name for name in found if name not in expected]:
        return f"{further[0]} is there besides"
    return next(
        (
            f"{name} is {found[name]} in place of {shape}"
            for name, shape in expected.items()
            if found[name] != shape
        ),
        "",
    )


def _shapes(record: Mapping[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in record.items()}


def _tensor(values: np.ndarray) -> torch.Tensor:
    # A read-only array would give a tensor that nobody may write to, with a warning.
    return torch.from_numpy(values if values.flags.writeable else values.copy())


def payload_bytes(content: RecordDict) -> int:
    """Return the bytes of all arrays in a message: entries times their size."""
    return sum(
        int(np.prod(array.shape, dtype=np.int64)) * np.dtype(array.dtype).itemsize
        for record in content.array_records.values()
        for array in record.values()
    )


def shapes_of(content: RecordDict) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of all arrays in a message, by record and name."""
    return {name: _shapes(arrays) for name, arrays in content.array_records.items()}


def flattened(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return tensors by group and name as tensors by ``group/name``."""
    return {f"{group}/{name}": value for group, named in groups.items() for name, value in named.items()}


def grouped(flat: Mapping[str, Any], groups: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return what ``flattened`` made apart again, with empty groups for those named."""
    found: dict[str, dict[str, Any]] = {group: {} for group in groups}
    for key, value in flat.items():
        group, _, name = key.partition("/")
        found.setdefault(group, {})[name] = value
    return found
