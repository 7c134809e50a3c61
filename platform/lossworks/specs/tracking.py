"""The part of a spec that says where runs and models are recorded."""

import warnings
from typing import Self

from pydantic import Field, model_validator

from lossworks.specs.base import Spec


class TrackingSpec(Spec):
    """Which MLflow store a run is written to."""

    uri: str | None = Field(
        None,
        description="http(s)://HOST:PORT or sqlite:////ABSOLUTE/PATH; default: a file in the home folder. "
        "User and password are taken from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or from "
        "~/.mlflow/credentials",
    )
    experiment: str = Field("lossworks", min_length=1, description="name of the MLflow experiment")
    system_metrics: bool = Field(True, description="record CPU, memory, disk and network of the machine")
    patience_s: float = Field(
        300.0, ge=0.0, description="seconds to wait at the end for a tracking server that is away"
    )

    # Of the group and not of the field, since the message of a field's error repeats the value.
    @model_validator(mode="after")
    def _holds_no_password(self) -> Self:
        scheme, colon, rest = (self.uri or "").partition("://")
        where = rest if scheme in ("http", "https") else rest.partition("/")[0]
        if colon and "@" in where:
            raise ValueError(
                "uri holds a user or password, which would be stored with every run; take them out and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials"
            )
        return self


with warnings.catch_warnings():
    # Classes inherit a method of this name from Python's abstract classes, which no spec uses.
    warnings.filterwarnings("ignore", 'Field name "register"')

    class ModelTrackingSpec(TrackingSpec):
        """Which MLflow store a run is written to, and what of its model."""

        model: bool = Field(
            True,
            description="log the best checkpoint's model, with signature and example, when the run finishes",
        )
        register: str | None = Field(
            None,
            pattern=r"^[^/:.\s][^/:]*$",
            max_length=250,
            description="name in MLflow's registry of which the model becomes a new version; implies model",
        )

        @property
        def logs_model(self) -> bool:
            """Whether the model is logged."""
            return self.model or self.register is not None
