"""Trained models in MLflow: logged to their run with a signature and an example, and registered."""

import contextlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossworks.errors import UserError
from lossworks.models.folders import (
    CLASSIFIER_FORMAT,
    CONFIG,
    PREDICTOR_FORMAT,
    SEGMENTER_FORMAT,
    read_config,
)
from lossworks.models.pretrained import CONFIG_BESIDE_TRANSFORMERS, FORMAT
from lossworks.specs.tracking import ModelTrackingSpec
from lossworks.tracking.client import connect, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

_PACKAGES = ("lossworks", "mlflow", "numpy", "pandas", "safetensors", "tokenizers", "torch")
_NAME = "model"
_MODEL_TAG = "lossworks.model"
_STEP_TAG = "lossworks.model.step"
_VERSIONS_TAG = "mlflow.modelVersions"  # by which MLflow's pages lead from a model to its versions
_EXAMPLE = "The loss of a text is its mean over the tokens."


def logged_step(spec: ModelTrackingSpec, run_id: str) -> int | None:
    """Return the step of the model that a run has logged, or None if it has logged none.

    Raises:
        RunError: The store can't be reached or refuses.
    """
    client = connect(spec)
    with store_errors(spec):
        step = client.get_run(run_id).data.tags.get(_STEP_TAG)
    return None if step is None else int(step)


def log_model(spec: ModelTrackingSpec, run_id: str, folder: Path, *, step: int) -> str:
    """Log the model in a folder to a run, register it if the spec says so, and return its id in MLflow.

    It is stored as a script of ours and the folder as it is, without a pickled object. A language model
    takes the column ``text`` and gives ``loss`` and ``bits_per_byte``; a classifier takes examples (N, …)
    float32 and gives probabilities, a regression values (N,) and a multi-label model scores; a segmenter
    takes images (N, C, H, W) and gives the probabilities of every pixel's classes, (N, H, W, K).

    Args:
        spec: Where the run is, and the name to register.
        run_id: The run.
        folder: What ``lossworks export`` writes.
        step: The step the model is from.

    Raises:
        UserError: The folder is of a format that is not known here, as of another package's task.
        RunError: The store can't be reached or refuses.
    """
    served = _served(folder)
    client = connect(spec)
    with store_errors(spec), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model = _create(client, run_id, step)
        with _failed_on_error(client, model.model_id):
            _write(served, Path(temporary) / _NAME, folder, run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(Path(temporary) / _NAME))
            client.finalize_logged_model(model.model_id, "READY")
            if spec.register is not None:
                _register(client, spec.register, run_id, model)
        client.set_tag(run_id, _MODEL_TAG, f"models:/{model.model_id}")
        client.set_tag(run_id, _STEP_TAG, str(step))
    return str(model.model_id)


@contextlib.contextmanager
def _failed_on_error(client: "MlflowClient", model_id: str) -> Iterator[None]:
    """Mark a model that was not logged completely, as far as the store can be reached."""
    try:
        yield
    except Exception:
        with contextlib.suppress(Exception):  # what went wrong first is what matters
            client.finalize_logged_model(model_id, "FAILED")
        raise


def _create(client: "MlflowClient", run_id: str, step: int) -> "LoggedModel":
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id, name=_NAME, source_run_id=run_id, params={"step": str(step)}
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=step)])
    return model


@dataclass(frozen=True)
class _Served:
    """How MLflow serves a model.

    Attributes:
        script: Beside this file: what MLflow executes.
        described: Gives signature and example.
    """

    script: str
    described: "Callable[[], tuple[ModelSignature, Any]]"


def _served(folder: Path) -> _Served:
    """Return how the model in a folder is served.

    Raises:
        UserError: Nothing here knows its format.
    """
    beside = folder / CONFIG_BESIDE_TRANSFORMERS
    config = read_config(beside if beside.is_file() else folder / CONFIG)
    known = {
        FORMAT: _Served("served_language_model.py", _texts),
        CLASSIFIER_FORMAT: _Served("served_classifier.py", lambda: _examples(config, "classes")),
        PREDICTOR_FORMAT: _Served("served_predictor.py", lambda: _examples(config, "names")),
        SEGMENTER_FORMAT: _Served("served_segmenter.py", lambda: _images(config)),
    }
    found = config.get("format")
    if found not in known:
        raise UserError(f"format={found!r} is not one that MLflow is given: {', '.join(known)}")
    return known[found]


def _write(served: _Served, path: Path, folder: Path, run_id: str, model_id: str) -> None:
    """Write what MLflow stores: the script, the folder, the signature, the example and the requirements."""
    from mlflow import pyfunc
    from mlflow.models import Model

    signature, example = served.described()
    pyfunc.save_model(
        path,
        python_model=str(Path(__file__).with_name(served.script)),
        artifacts={"model": str(folder)},
        signature=signature,
        input_example=example,
        pip_requirements=_requirements(folder),
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )


def _register(client: "MlflowClient", name: str, run_id: str, model: "LoggedModel") -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # Not by its id: an embedded store would look for that in MLflow's default store.
    version = client.create_model_version(
        name, model.artifact_location, run_id=run_id, model_id=model.model_id
    )
    versions = json.dumps([{"name": name, "version": version.version}])
    client.set_logged_model_tags(model.model_id, {_VERSIONS_TAG: versions})


def _examples(config: dict[str, Any], columns: str) -> "tuple[ModelSignature, Any]":
    """Return signature and example of a model of examples.

    Args:
        config: Of the model.
        columns: Its entry that names what is answered for each example, where that is more than a number.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    shape, kind = tuple(config["shape"]), np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, *shape))]),
        outputs=Schema([TensorSpec(kind, (-1, *([len(config[columns])] if columns in config else [])))]),
    )
    mean = (config["standardisation"] or {"mean": [0.0] * shape[0]})["mean"]
    column = np.array(mean, dtype=kind).reshape(1, -1, *[1] * (len(shape) - 1))
    return signature, np.broadcast_to(column, (1, *shape)).copy()


def _images(config: dict[str, Any]) -> "tuple[ModelSignature, Any]":
    """Return signature and example of a model of dense prediction."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    channels, kind = int(config["channels"]), np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (-1, channels, -1, -1))]),
        outputs=Schema([TensorSpec(kind, (-1, -1, -1, len(config["classes"])))]),
    )
    mean = np.array((config["standardisation"] or {"mean": [0.0] * channels})["mean"], dtype=kind)
    return signature, np.broadcast_to(mean.reshape(1, -1, 1, 1), (1, channels, 16, 16)).copy()


def _texts() -> "tuple[ModelSignature, Any]":
    """Return signature and example of a language model."""
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "text")]),
        outputs=Schema(
            [
                ColSpec("double", "loss"),
                ColSpec("double", "bits_per_byte"),
                ColSpec("string", "continuation", required=False),
            ]
        ),
        params=ParamSchema(
            [
                ParamSpec("new_tokens", "long", 0),
                ParamSpec("temperature", "double", 1.0),
                ParamSpec("seed", "long", 0),
            ]
        ),
    )
    return signature, pd.DataFrame({"text": [_EXAMPLE]})


def _requirements(folder: Path) -> list[str]:
    """Return exact versions of what loading needs; MLflow's own search would take minutes."""
    transformers = ("transformers",) if (folder / "lossworks.json").is_file() else ()
    # A local part such as +cpu names an index that `pip install` doesn't ask.
    versions = {
        name: importlib.metadata.version(name).partition("+")[0] for name in (*_PACKAGES, *transformers)
    }
    return [f"{name}=={version}" for name, version in sorted(versions.items())]
