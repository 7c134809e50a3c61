"""Who takes part in a federation, and so what the server knows of model and data."""

import json
from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path

from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks_federated.apps.app_rounds import AppRounds, initial_of
from lossworks_federated.apps.app_spec import AppSpec
from lossworks_federated.apps.prepared import PreparedApp
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.engines.sequential_grid import SequentialGrid
from lossworks_federated.nodes.agreement import agree
from lossworks_federated.nodes.node_rounds import NodeRounds
from lossworks_federated.nodes.own_data import server_setup
from lossworks_federated.server.rounds import RoundFiles, RoundLoop, Rounds, accountant_of, build_strategy
from lossworks_federated.shared_setup import SharedSetup, make_setup
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.specs import FederationSpec, StrategySpec
from lossworks_federated.virtual.devices import Devices

_AGREEMENT_S = 600.0


class Participants(ABC):
    """The clients of a federation as its server sees them.

    Args:
        spec: The federation.
    """

    def __init__(self, spec: FederationSpec) -> None:
        self.spec = spec

    @abstractmethod
    def check(self, *, deployed: bool) -> None:
        """See that the model before the first round can be made, and the data read that the server reads.

        Args:
            deployed: Whether nodes are connected already, as in a deployed federation.

        Raises:
            UserError: They can't.
        """

    def prepare(self, grid: Grid, folder: Path) -> None:
        """Ask nodes what the server must know before any round; a run's folder keeps it.

        Raises:
            UserError, RunError: They can't take part.
        """
        del grid, folder

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

    def check(self, *, deployed: bool) -> None:
        """See that data, split, model and devices can be made, and count what privacy will be spent."""
        del deployed
        for seed in self.spec.seeds:
            self.setup(StrategySpec(), seed)
            Devices(self.spec.devices, self.spec.split.clients, seed)
            for chosen in self.spec.strategies:
                accountant_of(self.spec, build_strategy(self.spec, chosen, self.spec.told(chosen, seed)))

    def app(self, state_folder: Path) -> ClientApp:
        """Return our ClientApp."""
        return client_app(state_folder, self.spec.privacy, self.spec.deadline_s or 0.0, reads_paths=True)

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

    def check(self, *, deployed: bool) -> None:
        """See that the package gives the model before the first round, for every seed."""
        del deployed
        for seed in self.spec.seeds:
            initial_of(self._app, seed)

    def app(self, state_folder: Path) -> ClientApp:
        """Return the package's ClientApp with its run configuration."""
        return PreparedApp(self._app.name, self._app.config, state_folder)

    def rounds(self, strategy: StrategySpec, seed: int, grid: Grid, files: RoundFiles) -> RoundLoop:
        """Return rounds whose model the package measures, if it does."""
        return AppRounds(self.spec, strategy, seed, self._app, grid, files)


class NodesWithData(Participants):
    """Our own clients on nodes of a deployed federation, each with data that its own configuration names."""

    _learnt: Learnt | None = None

    def check(self, *, deployed: bool) -> None:
        """See that there are nodes."""
        if not deployed:
            raise UserError(
                "split.kind=nodes: the data are at the nodes of a deployed federation (`flwr run`); "
                "`python -m lossworks_federated.loopback SPEC --data csv:A --data csv:B` shows it here"
            )

    def prepare(self, grid: Grid, folder: Path) -> None:
        """Let nodes agree on classes, columns and scale, unless they have in this run already."""
        kept = folder / "learnt"
        self._learnt = Learnt.read(kept, "the run")
        if self._learnt is None:
            task = self.spec.told(StrategySpec(), self.spec.seeds[0])
            self._learnt = agree(grid, task, self.spec.nodes, self.spec.deadline_s or _AGREEMENT_S)
            self._learnt.write(kept)

    def app(self, state_folder: Path) -> ClientApp:
        """Return our ClientApp."""
        return client_app(state_folder, self.spec.privacy, self.spec.deadline_s or 0.0)

    def rounds(self, strategy: StrategySpec, seed: int, grid: Grid, files: RoundFiles) -> RoundLoop:
        """Return rounds that are measured by the nodes' own tests."""
        facts = {} if self._learnt is None else self._learnt.facts
        setup = server_setup(self.spec.told(strategy, seed), facts)
        return NodeRounds(self.spec, strategy, setup, json.dumps(facts), grid, files)


def participants_of(spec: FederationSpec) -> Participants:
    """Return who takes part in a federation."""
    if spec.app is not None:
        return AppClients(spec, spec.app)
    return NodesWithData(spec) if spec.split.at_nodes else OwnClients(spec)


@lru_cache(maxsize=2)
def _setup(task: str) -> SharedSetup:
    return make_setup(TaskSpec.model_validate_json(task))
