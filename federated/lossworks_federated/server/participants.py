"""Who takes part in a federation, and so what the server knows of model and data."""

from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lossworks_federated.apps.app_rounds import AppRounds, initial_of
from lossworks_federated.apps.app_spec import AppSpec
from lossworks_federated.apps.prepared import PreparedApp
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.engines.sequential_grid import SequentialGrid
from lossworks_federated.server.rounds import RoundFiles, RoundLoop, Rounds, accountant_of, build_strategy
from lossworks_federated.shared_setup import SharedSetup, make_setup
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.specs import FederationSpec, StrategySpec
from lossworks_federated.virtual.devices import Devices


class Participants(ABC):
    """The clients of a federation as its server sees them.

    Args:
        spec: The federation.
    """

    def __init__(self, spec: FederationSpec) -> None:
        self.spec = spec

    @abstractmethod
    def check(self) -> None:
        """See that the model before the first round can be made, and the data read that the server reads.

        Raises:
            UserError: They can't.
        """

    @abstractmethod
    def app(self, state_folder: Path) -> ClientApp:
        """Return the ClientApp of an engine on this machine; clients keep things in a folder."""

    @abstractmethod
    def rounds(self, strategy: StrategySpec, seed: int, grid: Grid, files: RoundFiles) -> RoundLoop:
        """Return the rounds of one strategy and seed."""

    def grid(self, strategy: StrategySpec, seed: int, state_folder: Path) -> Grid:
        """Return the grid of an engine that needs no other process."""
        del strategy, seed
        app = self.app(state_folder)
        return SequentialGrid(app, self.spec.split.clients, deadline_s=self.spec.deadline_s)

    def setup(self, strategy: StrategySpec, seed: int) -> SharedSetup | None:
        """Return what clients have in common, where the server knows it."""
        del strategy, seed
        return None


class OwnClients(Participants):
    """Our own clients with data that the spec names and splits."""

    def check(self) -> None:
        """See that data, split, model and devices can be made, and count what privacy will be spent."""
        for seed in self.spec.seeds:
            self.setup(StrategySpec(), seed)
            Devices(self.spec.devices, self.spec.split.clients, seed)
            for chosen in self.spec.strategies:
                accountant_of(self.spec, build_strategy(self.spec, chosen, self.spec.told(chosen, seed)))

    def app(self, state_folder: Path) -> ClientApp:
        """Return our ClientApp."""
        return client_app(state_folder, self.spec.privacy, self.spec.deadline_s or 0.0)

    def grid(self, strategy: StrategySpec, seed: int, state_folder: Path) -> Grid:
        """Return a grid that trains a round's clients at once, or one that calls them in turn."""
        if self.spec.engine == "cohort":
            return CohortGrid(self.setup(strategy, seed), state_folder, self.spec.privacy)
        return super().grid(strategy, seed, state_folder)

    def rounds(self, strategy: StrategySpec, seed: int, grid: Grid, files: RoundFiles) -> RoundLoop:
        """Return rounds whose model is tested on the server's held-out examples."""
        return Rounds(self.spec, strategy, self.setup(strategy, seed), grid, files)

    def setup(self, strategy: StrategySpec, seed: int) -> SharedSetup:
        """Return what clients have in common."""
        # Strategies of a seed differ in the clients' learning rate at most, so data and split are made once.
        common = _setup(self.spec.told(StrategySpec(), seed).model_dump_json())
        return common.of(self.spec.told(strategy, seed))


class AppClients(Participants):
    """Clients that run a ClientApp of another package, which has model and data.

    Args:
        spec: The federation.
        app: The spec's.
    """

    def __init__(self, spec: FederationSpec, app: AppSpec) -> None:
        super().__init__(spec)
        self._app = app

    def check(self) -> None:
        """See that the package gives the model before the first round, for every seed."""
        for seed in self.spec.seeds:
            initial_of(self._app, seed)

    def app(self, state_folder: Path) -> ClientApp:
        """Return the package's ClientApp with its run configuration."""
        return PreparedApp(self._app.name, self._app.config, state_folder)

    def rounds(self, strategy: StrategySpec, seed: int, grid: Grid, files: RoundFiles) -> RoundLoop:
        """Return rounds whose model the package measures, if it does."""
        return AppRounds(self.spec, strategy, seed, self._app, grid, files)


def participants_of(spec: FederationSpec) -> Participants:
    """Return who takes part in a federation."""
    return OwnClients(spec) if spec.app is None else AppClients(spec, spec.app)


@lru_cache(maxsize=2)
def _setup(task: str) -> SharedSetup:
    return make_setup(TaskSpec.model_validate_json(task))
