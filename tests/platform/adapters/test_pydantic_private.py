"""What is used of pydantic besides its documented interface does what it is used for, in this version."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from lossworks.adapters.pydantic_private import fill_in, replace_extra


class Filled(BaseModel):
    """A frozen model that fills itself in."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    length: int = 0

    @model_validator(mode="after")
    def _fill(self) -> Self:
        fill_in(self, length=len(self.name))
        replace_extra(self, {"alpha": 1.0, **(self.model_extra or {})})
        return self


def test_a_frozen_model_is_filled_in():
    """Declared fields and others alike, as a dump and an equal model see them."""
    filled = Filled(name="abc", beta=2)  # type: ignore[call-arg]
    expected: dict[str, Any] = {"name": "abc", "length": 3, "alpha": 1.0, "beta": 2}

    assert filled.model_dump() == expected, "pydantic keeps further fields elsewhere than __pydantic_extra__"
    assert filled.model_extra == {"alpha": 1.0, "beta": 2}
    assert filled.alpha == 1.0  # type: ignore[attr-defined]
    assert filled == Filled.model_validate(expected)
    assert Filled.model_validate_json(filled.model_dump_json()) == filled
