"""Strategies: equalities of the papers, engines that agree, states that survive."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

from lossworks.errors import RunError, UserError
from lossworks.tensors import load_tensors
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.records import LocalArray, array_record, member_from
from lossworks_federated.server.principal_directions import principal_update
from lossworks_federated.strategies.catalogue import strategies, strategy
from lossworks_federated.strategies.interface import StrategyPlan
from lossworks_testing.federation import OneByOneGrid, difference, equal, rounds_of, setup_of, tiny, trained

logging.getLogger("flwr").setLevel(logging.ERROR)

ALL = [
    *(name for name in sorted(strategies())),
    {"name": "scaffold", "also": ["fedlex"]},
    {"name": "fedadam", "also": [{"name": "fedprox", "mu": 0.5}]},
    {"name": "fedld", "variant": "reference", "also": ["moon"]},
    {"name": "fedlex", "variant": "reference", "refresh": "each-round", "scaler": "robust"},
]


EVEN: dict[str, Any] = {  # every client has 80 examples of 600
    "data": {"source": "blobs:800"},
    "split": {"kind": "iid", "clients": 6},
}


def name_of(entry: object) -> str:
    return entry if isinstance(entry, str) else str(entry)


@pytest.mark.parametrize("entry", ALL, ids=name_of)
def test_cohort_gives_what_clients_give_one_by_one(entry: object, tmp_path: Path) -> None:
    spec = tiny(entry, clients_per_round=4, model={"kind": "resnet", "layers": 1, "width": 8, "groups": 2})
    if "fedbn" not in name_of(entry):
        spec = tiny(entry, clients_per_round=4)
    together = trained(spec, tmp_path / "together")
    apart = trained(spec, tmp_path / "apart", OneByOneGrid)
    assert difference(together, apart) < 1e-5


@pytest.mark.parametrize("entry", ALL, ids=name_of)
def test_going_on_after_any_round_equals_no_interruption(entry: object, tmp_path: Path) -> None:
    whole = trained(tiny(entry, rounds=4, clients_per_round=4), tmp_path / "whole")
    # The stop comes between the clients' work of round 3 and the state of it that the server saves.
    rounds = rounds_of(tiny(entry, rounds=4, clients_per_round=4), tmp_path / "cut")
    rounds._save = lambda done, model, save=rounds._save: save(done, model) if done < 3 else stop()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        rounds.run()
    again = trained(tiny(entry, rounds=4, clients_per_round=4), tmp_path / "cut")
    assert equal(whole, again)


def stop() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("entry", "same_as"),
    [
        ({"name": "fedprox", "mu": 0.0}, "fedavg"),
        ({"name": "moon", "mu": 0.0}, "fedavg"),
        ("fedbn", "fedavg"),  # the model has no normalisation layers
        ({"name": "fedavgm", "server_momentum": 0.0}, "fedavg"),
        ({"name": "fedavg", "also": [{"name": "fedprox", "mu": 0.3}]}, {"name": "fedprox", "mu": 0.3}),
        ({"name": "fedtrimmedavg", "beta": 0.0}, None),
    ],
    ids=name_of,
)
def test_strategies_that_are_fedavg(entry: object, same_as: object, tmp_path: Path) -> None:
    changes = EVEN if same_as is None else {}  # equal sizes make weighted and plain means the same
    ours = trained(tiny(entry, **changes), tmp_path / "ours")
    other = trained(tiny(same_as or "fedavg", **changes), tmp_path / "other")
    assert difference(ours, other) < 2e-6


def test_equal_steps_make_fednova_fedavg_and_unequal_ones_not(tmp_path: Path) -> None:
    nova, plain = (trained(tiny(name, **EVEN), tmp_path / name) for name in ("fednova", "fedavg"))
    assert difference(nova, plain) < 2e-6
    nova, plain = (trained(tiny(name), tmp_path / f"{name}-uneven") for name in ("fednova", "fedavg"))
    assert difference(nova, plain) > 1e-4


def test_one_full_batch_step_makes_all_of_them_gradient_descent(tmp_path: Path) -> None:
    changes = {
        **EVEN,
        "rounds": 2,
        "split": {"kind": "iid", "clients": 6, "test_fraction": 0.0},
        "local": {"epochs": 1, "batch_size": 100_000, "lr": 0.1},
    }
    spec = tiny("fedavg", **changes)
    setup = setup_of(spec)
    assert {len(rows) for rows in setup.split.train} == {100}
    model = {name: value.clone().requires_grad_() for name, value in setup.initial.items()}
    for _ in range(2):
        _, logits = setup.learner.model({n: v[None] for n, v in model.items()}, setup.train.inputs[None])
        loss = setup.learner.loss(logits[0], setup.train.labels).mean()
        gradients = torch.autograd.grad(loss, list(model.values()))
        model = {
            name: (value - 0.1 * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(model.items(), gradients, strict=True)
        }
    central = {name: value.detach() for name, value in model.items()}
    for entry in ("fedavg", {"name": "fedprox", "mu": 1.0}, "scaffold", "fednova"):
        found = trained(tiny(entry, **changes), tmp_path / name_of(entry))
        assert difference(found, central) < 2e-6


def test_scaffold_without_corrections_is_the_plain_mean(tmp_path: Path) -> None:
    spec = tiny("scaffold", rounds=1)
    rounds = rounds_of(spec, tmp_path)
    rounds.run()
    received, origin = rounds.strategy.received, rounds.strategy.origin
    new = trained(spec, tmp_path)
    for name, value in new.items():
        torch.testing.assert_close(value, origin[name] + received.updates[name].mean(0))


def test_fedld_aggregates_along_principal_directions(tmp_path: Path) -> None:
    for variant, first_is_mean in (("paper", False), ("reference", True)):
        spec = tiny({"name": "fedld", "variant": variant}, rounds=2)
        rounds = rounds_of(spec, tmp_path / variant)
        rounds.run()
        received, origin = rounds.strategy.received, rounds.strategy.origin
        after = trained(spec, tmp_path / variant)
        for name, updates in received.updates.items():
            torch.testing.assert_close(after[name], origin[name] + principal_update(updates, 0.8))
        once = tiny({"name": "fedld", "variant": variant}, rounds=1)
        rounds = rounds_of(once, tmp_path / f"{variant}-once")
        rounds.run()
        mean = {n: rounds.strategy.origin[n] + u.mean(0) for n, u in rounds.strategy.received.updates.items()}
        is_mean = difference(trained(once, tmp_path / f"{variant}-once"), mean) < 1e-6
        assert is_mean == first_is_mean


def test_fedlex_without_explorers_is_fedavg(tmp_path: Path) -> None:
    plain = trained(tiny(), tmp_path / "plain")
    spec = tiny("fedlex")
    rounds = rounds_of(spec, tmp_path / "fedlex")
    explore = rounds.strategy._explore
    guided = rounds.strategy.parts[0]
    rounds.strategy._explore = lambda *arguments: type(explore(*arguments)).nothing()  # type: ignore[attr-defined]
    rounds.run()
    assert not guided.to_clients({})
    assert equal(trained(spec, tmp_path / "fedlex"), plain)


def test_fedlex_guides_by_what_explorers_moved(tmp_path: Path) -> None:
    rounds = rounds_of(tiny("fedlex"), tmp_path)
    rounds.run()
    guidance = rounds.strategy.parts[0].to_clients({})
    assert guidance.keys() == rounds.strategy.origin.keys()
    assert all(value.min() >= 0 and value.max() <= 1 for value in guidance.values())
    assert guidance["layers.0.1.weight"].mean() < 0.5  # scaled before the mean, most entries are small


class Quadratics:
    """Clients with F_i(w) = ½(w − b_i)ᵀA_i(w − b_i), whose optimum is known."""

    def __init__(self) -> None:
        stream = np.random.default_rng(0)
        self.b = torch.tensor(stream.normal(size=(4, 3)))
        roots = torch.tensor(stream.normal(size=(4, 3, 3)))
        self.a = roots @ roots.transpose(1, 2) / 3 + 0.2 * torch.eye(3, dtype=torch.float64)
        self.optimum = torch.linalg.solve(self.a.sum(0), (self.a @ self.b[..., None]).sum(0))[:, 0]

    def after(
        self, name: str, rounds: int = 400, steps: int = 10, lr: float = 0.02, **settings: float
    ) -> float:
        """Return how far from the optimum a strategy ends, all clients taking part."""
        from lossworks_federated.server.screening import Received
        from lossworks_federated.spec_parts import LocalSpec
        from lossworks_federated.strategies.parts import Cohort, PartOutcome

        rounds, steps, lr = 400, 10, 0.02
        chosen = strategy(name)(**settings)
        chosen.clients = 4
        w = {"w": torch.zeros(3, dtype=torch.float64)}
        kept: dict = {}
        for _ in range(rounds):
            chosen.origin = w
            part = chosen.parts[0] if chosen.parts else None
            stacked = w["w"].repeat(4, 1)
            outcome, rule = PartOutcome(), None
            if part is not None:
                kept = kept or {"w": torch.zeros(4, 3, dtype=torch.float64)}
                cohort = Cohort(None, w, _InOrder(), LocalSpec(lr=lr), part.to_clients(w), kept)  # type: ignore[arg-type]
                rule = part.rule(cohort)
            for _ in range(steps):
                gradient = (self.a @ (stacked - self.b)[..., None])[..., 0]
                stacked = stacked - lr * (rule.gradient("w", gradient, stacked) if rule else gradient)
            ended = {"w": stacked}
            updates = {"w": stacked - w["w"]}
            if part is not None:
                outcome = part.finish(cohort, ended, torch.full((4,), steps))
                kept = outcome.kept
                part.absorb(outcome.sent, updates, 4)
            equal_sizes = torch.ones(4, dtype=torch.float64)
            received = Received((), (0, 1, 2, 3), equal_sizes, (), ended, updates, {}, {})
            w = chosen.combine(received)
        return float((w["w"] - self.optimum).norm())


class _InOrder:
    members = torch.arange(4)


def test_scaffold_and_feddyn_reach_the_optimum_that_fedavg_misses() -> None:
    clients = Quadratics()
    assert clients.after("fedavg") > 0.01
    assert clients.after("scaffold") < 1e-6
    assert clients.after("feddyn", alpha=1.0) < 1e-3


def test_feddyn_keeps_the_sum_of_its_states() -> None:
    # At full participation h is the mean of the clients' h_i with the opposite sign convention of the loss:
    # both sum the same −α(w − w⁰).
    from lossworks_federated.client.local_rules import Dynamic

    origin = {"w": torch.zeros(3)}
    ended = {"w": torch.randn(5, 3)}
    own = Dynamic.renewed({"w": torch.zeros(5, 3)}, origin, ended, 0.1)
    torch.testing.assert_close(own["w"].sum(0), -0.1 * ended["w"].sum(0))


def test_all_of_flowers_own_loop_can_run_ours() -> None:
    spec = tiny("fedld")
    setup = setup_of(spec)
    ours = strategy("fedld")(plan=StrategyPlan(task=setup.task.model_dump_json()), rho=0.5)
    assert isinstance(ours, FlowerFedAvg)
    result = ours.start(CohortGrid(setup), array_record(setup.initial), num_rounds=2)
    assert set(result.evaluate_metrics_clientapp) == {1, 2}
    assert member_from(result.arrays).keys() == setup.initial.keys()


def test_any_loss_of_rows_is_a_local_objective(tmp_path: Path) -> None:
    plain = trained(tiny(), tmp_path / "plain")
    other = trained(tiny(loss={"name": "ldr", "temperature": 0.7}), tmp_path / "ldr")
    assert difference(plain, other) > 1e-3


def test_seeds_decide_everything(tmp_path: Path) -> None:
    first, again = (trained(tiny(clients_per_round=3), tmp_path / name) for name in ("a", "b"))
    other = trained(tiny(clients_per_round=3, seeds=[1]), tmp_path / "c")
    assert equal(first, again)
    assert difference(first, other) > 1e-3


def test_hyperparameters_are_checked_where_they_are_given() -> None:
    for wrong, says in (
        ("fedavgg", "fedavg"),
        ({"name": "fedprox", "muu": 1}, "mu"),
        ({"name": "fedprox", "mu": -1}, "mu"),
        ({"name": "fedavg", "also": ["fedadam"]}, "client part"),
        ({"name": "fedprox", "also": ["fedprox"]}, "itself"),
    ):
        with pytest.raises(UserError, match=says):
            tiny(wrong)


def test_aggregates_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    rounds = rounds_of(tiny(), tmp_path)
    rounds.strategy.combine = lambda received: {  # type: ignore[attr-defined]
        name: value[0] / 0 for name, value in received.updates.items()
    }
    with pytest.raises(RunError, match=r"round 1: the aggregated layers.0.1.weight of fedavg is not finite"):
        rounds.run()
    assert equal(load_tensors(tmp_path / "child" / "model.safetensors"), setup_of(tiny()).initial)


def test_local_arrays_serialise_as_flowers_do() -> None:
    from flwr.app import Array

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    ours, theirs = LocalArray(values), Array(values)
    assert ours.data == theirs.data
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert ours.numpy() is values
