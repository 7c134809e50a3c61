"""The part of a federation's spec that names a ClientApp of another package."""

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from lossworks.adapters.pydantic_private import replace_extra
from lossworks.errors import nearest
from lossworks.specs.base import OpenSpec
from lossworks_federated.apps.offered import OfferedApp, RunValue, offered_app


class AppSpec(OpenSpec):
    """A ClientApp that an installed package offers, with its run configuration beside ``name``.

    ``app=NAME`` is short for ``app.name=NAME``.
    """

    shorthand: ClassVar[str | None] = "name"
    open_to: ClassVar[str | None] = "name"

    name: str = Field(
        min_length=1, description="entry point of the group lossworks.client_apps of an installed package"
    )

    @property
    def offered(self) -> OfferedApp:
        """What the package offers."""
        return offered_app(self.name)

    @property
    def config(self) -> dict[str, RunValue]:
        """The app's run configuration, defaults included."""
        return dict(self.model_extra or {})

    def further_fields(self) -> list[tuple[str, str, str]]:
        """Return the keys of the app's run configuration, their meaning and type."""
        own = self.offered.config
        return [(key, "of the app's run configuration", type(value).__name__) for key, value in own.items()]

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        own, given = self.offered.config, self.model_extra or {}
        for key, value in given.items():
            if key not in own:
                guess = nearest(key, own)
                hint = f"did you mean {guess}?" if guess else f"there are {', '.join(own) or 'none'}"
                raise ValueError(f"app={self.name}: {key} is no key of its run configuration; {hint}")
            _require_type(f"app.{key}", value, own[key])
        replace_extra(self, {key: given.get(key, value) for key, value in own.items()})
        return self


def _require_type(where: str, value: Any, like: RunValue) -> None:
    """Refuse a value of another type than the default has; a whole number is a real one, too."""
    fits = type(value) is type(like) or (isinstance(like, float) and type(value) is int)
    if not fits:
        raise ValueError(f"{where}={value!r}: must be of the type {type(like).__name__}, as {like!r} is")
