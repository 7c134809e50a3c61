"""What folders of models have in common: they appear complete or not at all, and are checked when read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lossworks.errors import UserError
from lossworks.files import appearing

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CLASSIFIER_FORMAT = "lossworks-classifier"
PREDICTOR_FORMAT = "lossworks-predictor"
SEGMENTER_FORMAT = "lossworks-segmenter"


def require_fit(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Check that tensors are those of a model, by name and shape.

    Raises:
        UserError: One is missing, of another shape, or unknown.
    """
    expected = model.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise UserError(f"{source}: lacks {name}, which the model has")
        if state[name].shape != tensor.shape:
            raise UserError(
                f"{source}: a checkpoint of another shape: {name} is {tuple(state[name].shape)} in the file "
                f"and {tuple(tensor.shape)} in the model"
            )
    for name in state:
        if name not in expected:
            raise UserError(f"{source}: holds {name}, which the model doesn't have")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder has one") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is truncated, or not a safetensors file: {error}") from None


def config_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as JSON.

    Raises:
        UserError: Its ``provenance``, which callers give, can't be written.
    """
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance: can't be written as JSON: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the mapping in a configuration file.

    Raises:
        UserError: It is missing or damaged.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder has one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    return config if isinstance(config, dict) else {}


def require_version(config: Mapping[str, Any], path: Path, known: int) -> None:
    """Check the version of a configuration's format.

    Raises:
        UserError: This Lossworks doesn't know it.
    """
    version = config.get("format_version")
    if version != known:
        raise UserError(f"{path}: format_version={version!r} is unknown; this Lossworks reads {known}")


def require_free(folder: Path) -> None:
    """Check that a folder can be made.

    Raises:
        UserError: It holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and isn't an empty folder; choose another or remove it")


def write_model(
    folder: Path, config: Mapping[str, Any], model: nn.Module, state: Mapping[str, Tensor]
) -> None:
    """Write a configuration and the tensors of a model to a folder, which appears complete or not at all.

    Args:
        folder: Absent or empty.
        config: With ``provenance``.
        model: By which names and shapes of the tensors are checked.
        state: Its unsharded ``state_dict()``.

    Raises:
        UserError: The folder isn't empty, a tensor doesn't fit, or ``provenance`` isn't JSON.
    """
    require_free(folder)
    text = config_text(config)
    require_fit(model, state, source="state")
    with appearing(folder) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(text, encoding="utf-8")


def fill_model(model: nn.Module, folder: Path) -> None:
    """Give a model, its parameters on any device, the tensors of a folder.

    Raises:
        UserError: They are missing, damaged, or those of another model.
    """
    state = read_tensors(folder / WEIGHTS)
    require_fit(model, state, source=str(folder / WEIGHTS))
    model.load_state_dict(state, assign=True)
