"""The privacy that rounds spend: against closed forms and published values, recorded, and refused in time."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lossworks.errors import RunError, UserError
from lossworks.tracking import read_all
from lossworks_federated.server.accountant import _ORDERS as ORDERS
from lossworks_federated.server.accountant import PrivacyAccountant, noise_over_sensitivity
from lossworks_federated.spec_parts import PrivacySpec
from lossworks_federated.strategies.interface import StrategyPlan
from lossworks_testing.federation import rounds_of, tiny

DELTA = 1e-5


def spent(asked: list[list[int]], present: int, *, secret: bool = True, **privacy: object) -> float:
    accountant = PrivacyAccountant(PrivacySpec.model_validate(privacy), secret=secret)
    for one in asked:
        accountant.spend(one, present)
    return accountant.epsilon


def delta_of(noise: float, epsilon: float) -> float:
    """δ of a Gaussian mechanism of sensitivity 1 (Balle, Wang 2018, theorem 8)."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 1 / (2 * noise), epsilon * noise
    return normal(a - b) - math.exp(epsilon) * normal(-a - b)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 10.0])
def test_a_round_of_local_noise_gives_its_epsilon(epsilon: float) -> None:
    """Where the usual formula gives too little noise, as for an ε of 10, too."""
    noise = noise_over_sensitivity(PrivacySpec(kind="local", epsilon=epsilon, delta=DELTA))
    assert delta_of(noise, epsilon) == pytest.approx(DELTA, rel=1e-6)
    assert spent([[0]], 3, kind="local", epsilon=epsilon) == pytest.approx(epsilon, rel=1e-6)


def test_the_usual_formula_would_not() -> None:
    usual = math.sqrt(2 * math.log(1.25 / DELTA)) / 10
    assert delta_of(usual, 10.0) > 2 * DELTA


@pytest.mark.parametrize("kind", ["local", "central"])
def test_rounds_of_a_client_compose_to_one_gaussian(kind: str) -> None:
    """Client 2 is asked four times of five; its noise counts as half of one round's."""
    privacy = {"kind": kind, "epsilon": 2.0, "noise_multiplier": 3.0, "delta": DELTA}
    found = spent([[0, 2], [1, 2], [2], [0, 1], [2, 1]], 4, secret=False, **privacy)
    noise = noise_over_sensitivity(PrivacySpec.model_validate(privacy))
    assert delta_of(noise / 2, found) == pytest.approx(DELTA, rel=1e-6)


def test_drawing_clients_in_secret_spends_less_and_as_published() -> None:
    """RDP of order 2, by hand: log(1 + q² min(4(e^ρ − 1), 2e^ρ)), ρ of the whole Gaussian, theorem 27."""
    asked = [[(7 * i + j) % 1000 for j in range(10)] for i in range(50)]
    privacy = {"kind": "central", "noise_multiplier": 2.0}
    accountant = PrivacyAccountant(PrivacySpec.model_validate(privacy), secret=True)
    accountant.spend(asked[0], 1000)
    rho = 2 / (2 * 1.0**2)
    by_hand = math.log1p(0.01**2 * min(4 * math.expm1(rho), 2 * math.exp(rho)))
    assert float(accountant.state()["rdp"][ORDERS.index(2.0)]) == pytest.approx(by_hand, rel=1e-9)

    in_secret, known = spent(asked, 1000, **privacy), spent(asked, 1000, secret=False, **privacy)
    assert 0 < in_secret < known


def test_clients_that_all_take_part_are_no_secret() -> None:
    everyone = [list(range(5))] * 7
    privacy = {"kind": "central", "noise_multiplier": 4.0}
    found = spent(everyone, 5, **privacy)
    assert delta_of(2.0 / 7**0.5, found) == pytest.approx(DELTA, rel=1e-6)


def test_the_forecast_is_what_is_spent() -> None:
    plan = StrategyPlan(seed=3, clients_per_round=4)
    accountant = PrivacyAccountant(PrivacySpec(kind="central", noise_multiplier=1.5), secret=True)
    forecast = accountant.forecast(20, lambda one: plan.trained_in(one, 30), 30)
    for server_round in range(1, 21):
        accountant.spend(plan.trained_in(server_round, 30).tolist(), 30)
        assert forecast._epsilon(server_round) == pytest.approx(accountant.epsilon, rel=1e-9)


# In federations


def epsilons(path: Path) -> list[float]:
    rows = [row["metrics"] for row in read_all(path / "child" / "metrics.jsonl") if row["step"]]
    return [row["privacy/epsilon"] for row in rows]


PRIVATE = {"kind": "central", "noise_multiplier": 2.0}


def test_epsilon_is_recorded_each_round_and_goes_on(tmp_path: Path) -> None:
    whole = rounds_of(tiny(rounds=4, privacy=PRIVATE, clients_per_round=3), tmp_path / "whole")
    whole.run()
    for rounds in (2, 4):
        spec = tiny(rounds=rounds, privacy=PRIVATE, clients_per_round=3)
        rounds_of(spec, tmp_path / "part").run()
    found = epsilons(tmp_path / "whole")
    by_hand = [
        spent([whole.strategy.plan.trained_in(one, 6).tolist() for one in range(1, done + 1)], 6, **PRIVATE)
        for done in (1, 2, 3, 4)
    ]

    assert found == pytest.approx(by_hand, rel=1e-9)
    assert found == epsilons(tmp_path / "part")
    assert sorted(found) == found


def test_without_noise_there_is_no_epsilon(tmp_path: Path) -> None:
    rounds_of(tiny(rounds=1, privacy={"kind": "central", "noise_multiplier": 0.0}), tmp_path).run()
    row = read_all(tmp_path / "child" / "metrics.jsonl")[-1]["metrics"]
    assert "privacy/epsilon" not in row


def test_a_repeated_round_counts_twice(tmp_path: Path) -> None:
    """Killed after round 2, of which no state is left: its noise is drawn anew."""
    spec = tiny(rounds=2, privacy=PRIVATE)
    rounds_of(spec, tmp_path).run()
    for state in (tmp_path / "child" / "states").glob("0000002*"):
        state.unlink()
    again = rounds_of(spec, tmp_path).run()

    three = spent([list(range(6))] * 3, 6, **PRIVATE)
    assert again.metrics["privacy/epsilon"] == pytest.approx(three, rel=1e-9)


def test_rounds_do_not_go_on_when_what_was_spent_is_unknown(tmp_path: Path) -> None:
    rounds_of(tiny(rounds=1, privacy=PRIVATE), tmp_path).run()
    (tmp_path / "child" / "privacy.safetensors").unlink()
    with pytest.raises(RunError, match=r"privacy\.safetensors is gone.*first 1 rounds have spent"):
        rounds_of(tiny(rounds=2, privacy=PRIVATE), tmp_path).run()


def test_clients_count_alike_under_central_noise(tmp_path: Path) -> None:
    private = rounds_of(tiny(rounds=1, privacy={"kind": "central", "noise_multiplier": 0.0}), tmp_path)
    private.run()
    received = private.strategy.received
    ended = private.strategy.combine(received)
    for name, update in received.updates.items():
        torch.testing.assert_close(ended[name], received.origin[name] + update.mean(0))
    assert float(received.examples.std()) > 1


def first_above(budget: float, epsilon: Callable[[int], float]) -> int:
    return next(one for one in range(1, 100) if epsilon(one) > budget)


@pytest.mark.parametrize("kind", ["local", "central"])
def test_rounds_above_the_budget_are_refused_before_the_first(kind: str, tmp_path: Path) -> None:
    privacy = {"kind": kind, "epsilon": 1.0, "noise_multiplier": 8.0}
    budget = 3.0
    first = first_above(budget, lambda rounds: spent([list(range(6))] * rounds, 6, **privacy))
    with pytest.raises(UserError, match=rf"privacy\.budget=3 .* round {first} of 60 would bring ε to 3\."):
        rounds_of(tiny(rounds=60, privacy={**privacy, "budget": budget}), tmp_path)
    assert not (tmp_path / "child" / "metrics.jsonl").exists()
    rounds_of(tiny(rounds=first - 1, privacy={**privacy, "budget": budget}), tmp_path / "within")


def test_a_repeated_round_that_the_budget_has_no_room_for_is_not_begun(tmp_path: Path) -> None:
    budget = 1.001 * spent([list(range(6))] * 2, 6, **PRIVATE)
    spec = tiny(rounds=2, privacy={**PRIVATE, "budget": budget})
    rounds_of(spec, tmp_path).run()
    for state in (tmp_path / "child" / "states").glob("0000002*"):
        state.unlink()
    with pytest.raises(RunError, match="repeated"):
        rounds_of(spec, tmp_path).run()


@pytest.mark.parametrize(
    ("privacy", "why"),
    [
        ({"budget": 3.0}, "nothing is private"),
        ({"kind": "central", "noise_multiplier": 0.0, "budget": 3.0}, "nothing is private"),
    ],
)
def test_a_budget_of_nothing_is_refused(privacy: dict[str, object], why: str) -> None:
    with pytest.raises(UserError, match=why):
        tiny(privacy=privacy)


def test_a_guard_that_compares_updates_is_refused_under_central_noise() -> None:
    with pytest.raises(UserError, match="change the mean by more than its own"):
        tiny(privacy="central", guard={"largest_norm": 5.0})


def test_clients_that_keep_something_are_no_secret(tmp_path: Path) -> None:
    """What they send tells when they were asked before, so only the first bound holds."""
    rounds = rounds_of(tiny("moon", rounds=2, privacy=PRIVATE, clients_per_round=2), tmp_path)
    rounds.run()
    drawn = [rounds.strategy.plan.trained_in(one, 6).tolist() for one in (1, 2)]
    most = int(np.bincount(np.concatenate(drawn)).max())
    assert delta_of(1.0 / most**0.5, epsilons(tmp_path)[-1]) == pytest.approx(DELTA, rel=1e-6)
