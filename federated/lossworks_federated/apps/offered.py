"""ClientApps that other installed packages offer.

They do so through entry points of the group ``lossworks.client_apps``: the name is what a spec calls the app,
and the value, ``module:NAME``, an :class:`OfferedApp`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from lossworks.errors import UserError, require_one

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp
    from torch import Tensor

GROUP = "lossworks.client_apps"

RunValue = bool | int | float | str
"""A value of a run configuration, as Flower has it."""


@dataclass(frozen=True)
class OfferedApp:
    """An ordinary ClientApp, and the model that its clients train.

    The app finds what Flower's quick-start apps find: the model in the record ``arrays``, ``lr`` and
    ``server-round`` in the record ``config``, ``partition-id`` and ``num-partitions`` in its node's
    configuration, and ``config`` below in its run configuration. It replies with the same arrays in a record
    ``arrays``, and ``num-examples`` in a record ``metrics``.

    Attributes:
        app: The ClientApp.
        initial: Takes a seed and returns the model before the first round, as ``state_dict()`` gives it:
            tensors by name, of any shapes and dtypes, all finite.
        evaluate: Takes such a model and returns what the server measures of it, numbers by name; ``accuracy``
            and ``loss`` are shown. None if the server has nothing to measure with.
        config: The app's run configuration, each key with its default.
        uses_local_rule: Whether its training uses ``lossworks_federated.apps.plain_torch.local_rule``, so
            that strategies with a part in clients can train it.
    """

    app: "ClientApp"
    initial: "Callable[[int], Mapping[str, Tensor]]"
    evaluate: "Callable[[Mapping[str, Tensor]], Mapping[str, float]] | None" = None
    config: Mapping[str, RunValue] = field(default_factory=dict)
    uses_local_rule: bool = False


@lru_cache(maxsize=8)
def offered_app(name: str) -> OfferedApp:
    """Import and return the app of that name.

    Raises:
        UserError: No installed package offers it, or it can't be used.
    """
    points = {point.name: point for point in entry_points(group=GROUP)}
    if not points:
        raise UserError(
            f"app={name}: no installed package offers a ClientApp; one does through an entry point of the "
            f"group {GROUP}"
        )
    return _loaded(points[require_one(name, list(points), "ClientApp")])


def _loaded(point: EntryPoint) -> OfferedApp:
    where = f"app={point.name}: {point.value}"
    try:
        found = point.load()
    except Exception as error:  # anybody's code
        raise UserError(f"{where}: can't be imported: {type(error).__name__}: {error}") from error
    if not isinstance(found, OfferedApp):
        raise UserError(f"{where}: is a {type(found).__name__}; it must be an OfferedApp")
    return found
