"""One measurement of ``lossworks bench federated``, in a process of its own: ``python -m ... CASE``."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord
from torch import nn

from lossworks.cohort import Member
from lossworks.tensors import write_tensors
from lossworks.training.measure.hardware import peak_memory_bytes
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.engines.simulation import simulate
from lossworks_federated.records import array_record, member_from
from lossworks_federated.server.rounds import build_strategy
from lossworks_federated.shared_setup import SharedSetup, make_setup
from lossworks_federated.specs import FederationSpec

if TYPE_CHECKING:
    from flwr.serverapp import Grid


def by_strategy(spec: FederationSpec, setup: SharedSetup, grid: "Grid") -> dict[str, Any]:
    """Do the rounds of a spec's strategy through a grid, and time each."""
    strategy = build_strategy(spec, spec.strategies[0], setup.task)
    model, whole, server = setup.initial, [], []
    for number in range(1, spec.rounds + 1):
        began = time.perf_counter()
        arrays = array_record(model)
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), grid))
        replies = list(grid.send_and_receive(messages))
        received = time.perf_counter()
        found, _ = strategy.aggregate_train(number, replies)
        model = member_from(found)
        ended = time.perf_counter()
        whole.append(ended - began)
        server.append(ended - received)
    return {"seconds": whole, "server": server, "model": model}


def by_cohort(spec: FederationSpec, setup: SharedSetup) -> dict[str, Any]:
    """Do the rounds with the cohort engine."""
    return by_strategy(spec, setup, CohortGrid(setup))


def by_flower(spec: FederationSpec, setup: SharedSetup) -> dict[str, Any]:
    """Do the rounds in Flower's own simulation."""
    found: dict[str, Any] = {}
    simulate(spec, client_app(), lambda grid: found.update(by_strategy(spec, setup, grid)))
    return found


def rounds_by_loop(spec: FederationSpec, setup: SharedSetup) -> dict[str, Any]:
    """Do the rounds of FedAvg with a bare loop: one module, one optimiser, one client at a time."""
    strategy = build_strategy(spec, spec.strategies[0], setup.task)
    model = setup.kind.build_model()
    now, seconds = setup.initial, []
    for number in range(1, spec.rounds + 1):
        nodes = [(client, client) for client in range(spec.split.clients)]
        chosen = strategy.drawn(nodes, spec.clients_per_round, number)
        began = time.perf_counter()
        total: Member = {name: torch.zeros_like(value) for name, value in now.items()}
        examples = 0
        for client, _ in chosen:
            model.load_state_dict(now)
            _train(model, setup, number, client)
            count = len(setup.split.train[client])
            examples += count
            for name, value in model.named_parameters():
                total[name] += count * value.detach()
        now = {name: value / examples for name, value in total.items()}
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "server": [], "model": now}


def _train(model: nn.Module, setup: SharedSetup, number: int, client: int) -> None:
    """Train one client as plain torch code would, on the batches that all methods take."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setup.task.local.lr)
    loss = nn.CrossEntropyLoss()
    for rows in setup.batches_of(client, number):
        optimizer.zero_grad()
        batch = setup.train.batch(rows.numpy())
        logits = model.logits(batch["inputs"])  # type: ignore[operator]
        loss(logits.flatten(0, -2), batch["targets"].flatten()).backward()
        optimizer.step()


def by_pfl(spec: FederationSpec, setup: SharedSetup) -> dict[str, Any]:
    """Do the rounds in Apple's pfl simulator."""
    from lossworks_federated.benchmarks.pfl_rounds import federate_by_pfl

    return federate_by_pfl(spec, setup)


ENGINES: dict[str, Callable[[FederationSpec, SharedSetup], dict[str, Any]]] = {
    "cohort": by_cohort,
    "loop": rounds_by_loop,
    "flower": by_flower,
    "pfl": by_pfl,
}


def main() -> None:
    """Measure the case in the first argument and print what was found as JSON."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    logging.getLogger("flwr").setLevel(logging.ERROR)
    spec = FederationSpec.parse(case["spec"])
    setup = make_setup(spec.told(spec.strategies[0], spec.seeds[0]))
    found = ENGINES[case["method"]](spec, setup)
    model = found.pop("model")
    squares = sum(float((value - setup.initial[name]).square().sum()) for name, value in model.items())
    found["moved"] = squares**0.5
    write_tensors(Path(case["model"]), model)
    found["parameters"] = sum(value.numel() for value in setup.initial.values())
    found["peak_bytes"] = peak_memory_bytes(torch.device("cpu"))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
