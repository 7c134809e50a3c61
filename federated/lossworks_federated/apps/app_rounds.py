"""Rounds of an app that another package offers: its own model, and its own evaluation if it has one."""

from collections.abc import Mapping

from flwr.serverapp import Grid
from torch import Tensor

from lossworks.cohort import Member
from lossworks.errors import UserError
from lossworks_federated.apps.app_spec import AppSpec
from lossworks_federated.apps.prepared import streams_seeded
from lossworks_federated.server.rounds import RoundFiles, RoundLoop
from lossworks_federated.server.screening import Received
from lossworks_federated.specs import FederationSpec, StrategySpec


class AppRounds(RoundLoop):
    """Rounds of a spec's ``app``.

    Args:
        spec: The federation.
        chosen: The strategy.
        seed: Of the initial model and of draws.
        app: The spec's.
        grid: The engine.
        files: Where to save.

    Raises:
        UserError: The package's initial model is none.
    """

    def __init__(
        self,
        spec: FederationSpec,
        chosen: StrategySpec,
        seed: int,
        app: AppSpec,
        grid: Grid,
        files: RoundFiles,
    ) -> None:
        super().__init__(spec, chosen, spec.told(chosen, seed), initial_of(app, seed), grid, files)
        self._app, self._seed = app, seed

    def held_out(self, model: Member) -> dict[str, float]:
        """Return what the package measures of a model, if it measures anything.

        Raises:
            UserError: It gives something else than numbers.
        """
        evaluate = self._app.offered.evaluate
        with streams_seeded([self._seed]):
            found = {} if evaluate is None else evaluate(model)
        wrong = [name for name, value in found.items() if not isinstance(value, int | float)]
        if wrong:
            raise UserError(f"app={self._app.name}: evaluate gives {wrong[0]}={found[wrong[0]]!r}, no number")
        return {f"server/{name}": float(value) for name, value in found.items()}

    def trained(self, received: Received) -> dict[str, float]:
        """Return the means over examples of all numbers that every client reports."""
        common = set.intersection(*(set(one) for one in received.metrics)) - {"num-examples"}
        return {f"train/{name}": received.mean(name) for name in sorted(common) if received.reports(name)}


def initial_of(app: AppSpec, seed: int) -> Member:
    """Return an app's model before the first round, with memory of its own.

    Raises:
        UserError: The package gives something else than finite tensors by name.
    """
    where = f"app={app.name}: initial({seed})"
    with streams_seeded([seed]):
        given = app.offered.initial(seed)
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where} must be tensors by name, as state_dict() gives them; it is {given!r:.80}")
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{where}: {name} is a {type(value).__name__}, no tensor")
        if not value.isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinity")
    if not any(value.is_floating_point() for value in given.values()):
        raise UserError(f"{where}: holds no real numbers, so nothing to train")
    return {name: value.detach().cpu().contiguous().clone() for name, value in given.items()}
