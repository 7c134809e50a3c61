"""Named tensors in a file of safetensors: written in one piece, read without running anything."""

import json
import os
import re
from pathlib import Path

from torch import Tensor

from lossworks.errors import RunError


def write_tensors(file: Path, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write tensors of any shapes to a file in one piece, with their order and further texts.

    Raises:
        OSError: Storage refuses, with the number and the text that it gives.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_suffix(".partial")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    try:
        save_file(whole, partial, metadata={"order": json.dumps(list(whole)), **metadata})
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))  # the library passes on no more than the text
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from None
    partial.replace(file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, of the shapes and in the order in which they were saved.

    Raises:
        RunError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as found:
            order = json.loads((found.metadata() or {})["order"])
            return {name: found.get_tensor(name) for name in order}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RunError(f"{file}: is damaged: {error}") from None


def metadata_of(file: Path) -> dict[str, str]:
    """Return the texts that a file was written with.

    Raises:
        RunError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as found:
            return dict(found.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise RunError(f"{file}: is damaged: {error}") from None
