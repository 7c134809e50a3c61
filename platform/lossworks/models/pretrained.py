"""Trained models as folders: written in one step, read back bit for bit.

A folder of our own transformer holds ``config.json`` (format version, model spec, vocabulary size,
provenance), ``model.safetensors`` and ``tokenizer.json``. A folder of a transformers model is what its
``save_pretrained`` writes, so that the library reads it, with our configuration as ``lossworks.json``.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from lossworks.errors import UserError
from lossworks.files import appearing
from lossworks.models.folders import (
    CLASSIFIER_FORMAT,
    CONFIG,
    PREDICTOR_FORMAT,
    WEIGHTS,
    config_text,
    read_config,
    read_tensors,
    require_fit,
    require_free,
    require_version,
)
from lossworks.models.huggingface import HuggingFaceModel, from_config
from lossworks.models.interface import LanguageModel
from lossworks.models.transformer import Transformer
from lossworks.specs import ModelSpec

FORMAT = "lossworks-model"
FORMAT_VERSION = 1
CONFIG_BESIDE_TRANSFORMERS = "lossworks.json"
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
    require_free(folder)
    config = _config_text(spec, vocab_size, provenance)
    _read_tokenizer(Path(tokenizer_path))
    model = model_with(spec, vocab_size, state)
    with appearing(folder) as temporary:
        if isinstance(model, HuggingFaceModel):
            model.model.save_pretrained(temporary)
            (temporary / CONFIG_BESIDE_TRANSFORMERS).write_text(config, encoding="utf-8")
        else:
            own = model.state_dict()
            save_file({name: tensor.contiguous() for name, tensor in own.items()}, temporary / WEIGHTS)
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
    state = read_tensors(folder / WEIGHTS)
    model = _empty_model(spec, vocab_size)
    require_fit(model, state, source=str(folder / WEIGHTS))
    model.load_state_dict(state, assign=True)
    return model.eval(), tokenizer


def model_with(spec: ModelSpec, vocab_size: int, state: Mapping[str, Tensor]) -> LanguageModel:
    """Return a model with given tensors, on their device and in training mode.

    Args:
        spec: What it was built from; of an ``hf:PATH``, the configuration is read from there.
        vocab_size: V of our own transformer.
        state: Its unsharded ``state_dict()``, which becomes the model's own; one name of tied tensors is
            enough.

    Raises:
        UserError: ``state`` doesn't fit ``spec``, or the configuration can't be read.
    """
    model = _empty_model(spec, vocab_size)
    whole = _complete(model, state)
    require_fit(model, whole, source="state")
    model.load_state_dict(whole, assign=True)
    if isinstance(model, HuggingFaceModel):
        model.model.tie_weights()
    return model


def read_provenance(folder: str | Path) -> dict[str, Any]:
    """Return where the model in a folder comes from, as ``save_model`` was told.

    Raises:
        UserError: The folder holds no model of ours.
    """
    for name in (CONFIG_BESIDE_TRANSFORMERS, CONFIG):
        path = Path(folder) / name
        if path.is_file():
            return dict(read_config(path).get("provenance") or {})
    raise UserError(f"{folder}: holds no exported model")


def _empty_model(spec: ModelSpec, vocab_size: int) -> LanguageModel:
    """Return the model with parameters on the meta device: names and shapes, no memory, no random numbers."""
    if spec.source != "transformer":
        return from_config(spec)
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


def _config_text(spec: ModelSpec, vocab_size: int, provenance: Mapping[str, Any]) -> str:
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": spec.model_dump(mode="json"),
        "vocab_size": vocab_size,
        "provenance": dict(provenance),
    }
    return config_text(config)


def _read_config(path: Path) -> tuple[ModelSpec, int]:
    config = read_config(path)
    if config.get("format") == CLASSIFIER_FORMAT:
        raise UserError(
            f"{path.parent}: holds a classifier, no language model; lossworks.models.load_classifier reads it"
        )
    if config.get("format") == PREDICTOR_FORMAT:
        raise UserError(
            f"{path.parent}: holds a model of examples, no language model; lossworks.models.load_predictor "
            "reads it"
        )
    if config.get("format") != FORMAT:
        raise UserError(
            f"{path}: isn't a Lossworks model; a folder of transformers is named hf:PATH, in a spec as "
            "model.source=hf:PATH"
        )
    require_version(config, path, FORMAT_VERSION)
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise UserError(f"{path}: vocab_size={vocab_size!r} must be a whole number of at least 1")
    return ModelSpec.parse(config.get("model") or {}, source=str(path)), vocab_size


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"{path}: no such file; a model folder has a tokenizer")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises nothing narrower
        raise UserError(f"{path}: isn't a tokenizer of the tokenizers library: {error}") from None
