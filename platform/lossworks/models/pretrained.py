"""Trained models as folders: written in one step, read back bit for bit.

A folder of our own transformer holds ``config.json`` (format version, model spec, vocabulary size,
provenance), ``model.safetensors`` and ``tokenizer.json``. A folder of a transformers model is what its
``save_pretrained`` writes, so that the library reads it, with our configuration as ``lossworks.json``.
"""

import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from lossworks.errors import UserError
from lossworks.models.huggingface import HuggingFaceModel, from_config, local_folder
from lossworks.models.interface import LanguageModel
from lossworks.models.transformer import Transformer
from lossworks.specs import ModelSpec

FORMAT = "lossworks-model"
FORMAT_VERSION = 1
CONFIG = "config.json"
CONFIG_BESIDE_TRANSFORMERS = "lossworks.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"


def save_model(
    folder: str | Path,
    *,
    spec: ModelSpec,
    state: Mapping[str, Tensor],
    vocab_size: int,
    tokenizer_path: Path,
    provenance: Mapping[str, Any],
) -> None:
    """Write a trained model to ``folder``, which appears complete or not at all.

    Args:
        folder: Absent or empty.
        spec: What the model was built from; of an ``hf:PATH``, the configuration is read from there.
        state: The model's unsharded ``state_dict()``; one name of tied tensors is enough.
        vocab_size: V as given to ``build_model``.
        tokenizer_path: The ``tokenizer.json`` to copy.
        provenance: Where the model comes from, such as run, step and commit; anything JSON can hold.

    Raises:
        UserError: ``folder`` isn't empty, ``state`` doesn't fit ``spec``, the tokenizer can't be read, or
            ``provenance`` isn't JSON.
    """
    folder = Path(folder)
    _require_free(folder)
    config = _config_text(spec, vocab_size, provenance)
    _read_tokenizer(Path(tokenizer_path))
    model = _empty_model(spec, vocab_size)
    state = _complete(model, state)
    _require_fit(model, state, source="state")
    with _appearing(folder) as temporary:
        if isinstance(model, HuggingFaceModel):
            model.load_state_dict(state, assign=True)
            model.model.tie_weights()
            model.model.save_pretrained(temporary)
            (temporary / CONFIG_BESIDE_TRANSFORMERS).write_text(config, encoding="utf-8")
        else:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary / WEIGHTS)
            (temporary / CONFIG).write_text(config, encoding="utf-8")
        shutil.copyfile(tokenizer_path, temporary / TOKENIZER)


def load_model(folder: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Return the model that ``save_model`` wrote, on the CPU and in eval mode, and its tokenizer.

    Raises:
        UserError: A file is missing or damaged, of an unknown format, or its tensors don't fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder")
    beside = folder / CONFIG_BESIDE_TRANSFORMERS
    spec, vocab_size = _read_config(beside if beside.is_file() else folder / CONFIG)
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    if spec.source != "transformer":
        return HuggingFaceModel.load(folder, vocab_size=vocab_size), tokenizer
    state = _read_tensors(folder / WEIGHTS)
    model = _empty_model(spec, vocab_size)
    _require_fit(model, state, source=str(folder / WEIGHTS))
    model.load_state_dict(state, assign=True)
    return model.eval(), tokenizer


def _empty_model(spec: ModelSpec, vocab_size: int) -> LanguageModel:
    """Return the model with parameters on the meta device: names and shapes, no memory, no random numbers."""
    if spec.source != "transformer":
        return from_config(local_folder(spec))
    with torch.device("meta"):
        return Transformer(spec, vocab_size=vocab_size)


def _complete(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with tied tensors under all of their names."""
    complete = dict(state)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        given = next((state[name] for name in tied if name in state), None)
        if given is not None:
            complete.update((name, given) for name in tied if name not in state)
    return complete


def _require_fit(model: LanguageModel, state: Mapping[str, Tensor], *, source: str) -> None:
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


def _config_text(spec: ModelSpec, vocab_size: int, provenance: Mapping[str, Any]) -> str:
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": spec.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "provenance": dict(provenance),
    }
    try:
        return json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"provenance: can't be written as JSON: {error}") from None


def _read_config(path: Path) -> tuple[ModelSpec, int]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder has one") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(
            f"{path}: isn't a Lossworks model; train on a transformers folder by model.source=hf:PATH"
        )
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version={version!r} is unknown; this Lossworks reads {FORMAT_VERSION}"
        )
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path}: vocab_size={vocab_size!r} must be a whole number of at least 1")
    return ModelSpec.parse(config.get("model") or {}, source=str(path)), vocab_size


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a model folder has one") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is truncated, or not a safetensors file: {error}") from None


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder has a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        raise UserError(f"{path}: isn't a tokenizer of the tokenizers library: {error}") from None


def _require_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and isn't an empty folder; choose another or remove it")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``folder`` at the end, or vanishes on an error."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        _rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _rename(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError as error:  # someone else has filled the folder since it was looked at
        raise UserError(f"{folder}: can't be put in place: {error.strerror}") from None
