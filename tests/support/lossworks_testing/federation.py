"""Small federations for tests: run in this process, with what a test wants to look at."""

import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message, RecordDict

from lossworks.catalogue.registry import Catalogue
from lossworks.cohort import Member
from lossworks_federated.apps.offered import offered_app
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.server.rounds import RoundFiles, Rounds
from lossworks_federated.shared_setup import SharedSetup, make_setup
from lossworks_federated.spec_parts import TaskSpec
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies import catalogue

TINY: dict[str, Any] = {
    "rounds": 3,
    "data": {"source": "digits"},
    "split": {"kind": "dirichlet", "clients": 6, "alpha": 0.3, "min_size": 8},
    "model": {"kind": "mlp", "layers": 1, "width": 8},
    "local": {"epochs": 1, "batch_size": 32, "lr": 0.1},
}


def tiny(strategy: Any = "fedavg", **changes: Any) -> FederationSpec:
    """Return a small spec of one strategy; changes replace whole fields."""
    return FederationSpec.parse({**TINY, "strategies": [strategy], **changes})


def setup_of(spec: FederationSpec) -> SharedSetup:
    """Return the setup of a spec's only strategy and seed, made once."""
    return _made(spec.told(spec.strategies[0], spec.seeds[0]).model_dump_json())


@lru_cache(maxsize=8)
def _made(task: str) -> SharedSetup:
    return make_setup(TaskSpec.model_validate_json(task))


def rounds_of(spec: FederationSpec, path: Path, grid: Any = None) -> Rounds:
    """Return the rounds of a spec's only strategy, to run in a folder."""
    setup = setup_of(spec)
    engine = CohortGrid(setup, path / "clients", spec.privacy) if grid is None else grid(setup)
    return Rounds(spec, spec.strategies[0], setup, engine, RoundFiles(path / "child"))


def trained(spec: FederationSpec, path: Path, grid: Any = None) -> Member:
    """Return the global model after all rounds."""
    from lossworks.tensors import load_tensors

    rounds_of(spec, path, grid).run()
    return load_tensors(path / "child" / "model.safetensors")


def difference(first: Member, second: Member) -> float:
    """Return the largest difference of two models."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def equal(first: Member, second: Member) -> bool:
    """Return whether two models are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class OneByOneGrid(CohortGrid):
    """Calls the ClientApp once a message, as a real federation does, in an order of its own."""

    def __init__(self, setup: SharedSetup, state_folder: Path | None = None) -> None:
        super().__init__(setup, state_folder)
        self.app = client_app(state_folder, reads_paths=True)
        del self.nodes  # so that clients are asked for them

    def get_node_ids(self) -> list[int]:
        """Return ids that say nothing about partitions."""
        return [1000 - client for client in range(self._setup.task.split.clients)]

    def _group(self, kind: str, group: list[Message]) -> list[Message]:
        del kind
        return [self._answer(message) for message in reversed(group)]

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._contexts:
            config = {"partition-id": 1000 - node}
            self._contexts[node] = Context(1, node, config, RecordDict(), {})
        try:
            return self.app(message, self._contexts[node])
        except Exception as error:  # noqa: BLE001  (as Flower does)
            return Message(Error(2, str(error)), reply_to=message)


OTHER_PACKAGE = Path(__file__).parents[1] / "other_package"


def install_package(
    folder: Path, patch: pytest.MonkeyPatch, points: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Offer what another package has for federations, for as long as the patch holds.

    Args:
        folder: A new one, for what an installed package says of itself.
        patch: Puts it on the path.
        points: Entry points by group and name; those of tests/support/other_package if unset.
    """
    if points is None:
        text = (OTHER_PACKAGE / "pyproject.toml").read_text()
        groups = ("lossworks.strategies", "lossworks.client_apps")
        points = {group: tomllib.loads(text)["project"]["entry-points"][group] for group in groups}
    info = folder / "lossworks_other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lossworks-other\nVersion: 1.0\n")
    lines = [
        line
        for group, of in points.items()
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in of.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    patch.syspath_prepend(str(OTHER_PACKAGE))
    patch.syspath_prepend(str(folder))
    patch.setattr(catalogue, "_catalogue", Catalogue(catalogue.FILE, {"strategies": "strategy"}))
    offered_app.cache_clear()
