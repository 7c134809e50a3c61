"""pydantic besides its documented interface: fields of a frozen model that are filled in by its validator."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel


def fill_in(model: BaseModel, **fields: Any) -> None:
    """Set declared fields of a frozen model; call it in the model's own validator only."""
    for name, value in fields.items():
        object.__setattr__(model, name, value)


def replace_extra(model: BaseModel, values: Mapping[str, Any]) -> None:
    """Replace the fields that a model of ``extra="allow"`` was given beside its declared ones.

    Call it in the model's own validator only; ``model_extra`` and ``model_dump`` give what is set here.
    """
    object.__setattr__(model, "__pydantic_extra__", dict(values))
