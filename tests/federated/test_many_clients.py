"""Federations of more clients than fit into memory: what they take, and that they go on."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lossworks_federated.client.client_store import ClientStore
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.engines.in_process_grid import NumberedNodes
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.fedavg import FedAvg
from lossworks_federated.strategies.interface import StrategyPlan
from lossworks_testing.federation import setup_of, tiny

MILLION = Path(__file__).parents[2] / "federated" / "specs" / "million.yaml"


def test_a_million_nodes_are_numbered_and_drawn_like_a_list() -> None:
    nodes = NumberedNodes(1_000_000)
    listed = [(one, one + 1) for one in range(1_000_000)]
    strategy = FedAvg(plan=StrategyPlan(seed=5, clients_per_round=1000))

    assert len(nodes) == 1_000_000
    assert nodes[-1] == listed[-1]
    assert nodes[7:9] == listed[7:9]
    assert strategy.drawn(nodes, 1000, 3) == strategy.drawn(listed, 1000, 3)
    assert strategy.plan.trained_in(3, 1_000_000).tolist() == [
        one for one, _ in strategy.drawn(nodes, 1000, 3)
    ]
    with pytest.raises(IndexError):
        nodes[1_000_000]


def test_the_grid_answers_for_its_nodes() -> None:
    grid = CohortGrid(setup_of(tiny()))
    assert list(grid.get_node_ids()) == [node for _, node in grid.nodes] == [1, 2, 3, 4, 5, 6]


def test_clients_of_several_threads_share_a_store(tmp_path: Path) -> None:
    """As processes of Flower's simulation do, each of which opens the file for itself."""
    store = ClientStore(tmp_path / "clients.sqlite")

    def work(client: int) -> None:
        for server_round in (1, 2, 3):
            kept = {"scaffold": {"w": torch.tensor([10.0 * client + server_round])}}
            store.write([(client, kept)], server_round, safe=server_round - 1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    found = store.read(range(13), before=3)

    assert [float(one["scaffold"]["w"]) for one in found[:12]] == [10.0 * client + 2 for client in range(12)]
    assert found[12] == {}


def test_the_spec_of_a_million_is_one() -> None:
    spec = FederationSpec.read(MILLION)
    assert (spec.split.clients, spec.clients_per_round, spec.rounds) == (1_000_000, 1000, 100)
    assert [strategy.name for strategy in spec.strategies] == ["scaffold"]


COMMAND = """
import resource, sys
from lossworks.cli import main
main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")
"""


def run(home: Path, *arguments: str) -> int:
    """Run the command in a process of its own and return its largest resident memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "federate", *arguments],
        env={"PATH": "/usr/bin:/bin", "LOSSWORKS_HOME": str(home), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"peak (\d+) MiB", done.stdout)
    assert found, done.stdout + done.stderr
    assert done.returncode == 0
    return int(found[1])


@pytest.mark.slow
def test_a_hundred_thousand_clients_take_no_more_memory_than_their_examples(tmp_path: Path) -> None:
    """A tenth of the million: 10 examples each on disk, and two rounds of a thousand with state."""
    small = ["split.clients=100000", "data.source=blobs:1001000", "rounds=2", "measure.every=2"]
    peak = run(tmp_path / "home", str(MILLION), *small, "measure.terms=false")
    more = run(tmp_path / "more", str(MILLION), *small, "measure.terms=false", "rounds=6")
    (store,) = (tmp_path / "home").rglob("clients.sqlite")
    (longer,) = (tmp_path / "more").rglob("clients.sqlite")

    assert peak < 1400  # of which the interpreter with torch, Flower, MLflow and matplotlib has half
    assert more < peak + 100  # what 4,000 further clients keep is on disk
    assert longer.stat().st_size > 2 * store.stat().st_size
