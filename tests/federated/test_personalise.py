"""Fine-tuning of the global model by each client, beside the global model."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet

from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.server.personal_tests import PersonalTest, personal_spread
from lossworks_testing.federation import OneByOneGrid, equal, rounds_of, setup_of, tiny, trained

logging.getLogger("flwr").setLevel(logging.ERROR)


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path / "child" / "personalised.parquet").to_pylist()
    return rows


def test_what_a_client_makes_of_the_model_against_a_loop(tmp_path: Path) -> None:
    """One epoch in batches of all its examples is one step of gradient descent."""
    local = {"epochs": 2, "batch_size": 100_000, "lr": 0.1}
    spec = tiny(measure={"personalise": 1}, local=local)
    outcome = rounds_of(spec, tmp_path).run()
    setup, rows = setup_of(spec), rows_of(tmp_path)
    model = load_tensors(tmp_path / "child" / "model.safetensors")
    assert [row["client"] for row in rows] == list(range(6))
    for row in rows:
        train, test = (
            torch.from_numpy(part[row["client"]]) for part in (setup.split.train, setup.split.test)
        )
        start = {name: value.clone().requires_grad_() for name, value in model.items()}

        def logits(params: dict[str, torch.Tensor], chosen: torch.Tensor) -> torch.Tensor:
            stacked = {name: value[None] for name, value in params.items()}
            return setup.learner.model(stacked, setup.train.inputs[chosen][None])[1][0]

        loss = torch.nn.functional.cross_entropy(logits(start, train), setup.train.labels[train])
        steps = torch.autograd.grad(loss, list(start.values()))
        own = {name: start[name].detach() - 0.1 * step for name, step in zip(start, steps, strict=True)}
        for params, name in ((start, ""), (own, "personal_")):
            z, y = logits(params, test).detach(), setup.train.labels[test]
            assert row[f"{name}accuracy"] == pytest.approx(float((z.argmax(1) == y).float().mean()), abs=1e-6)
            expected = float(torch.nn.functional.cross_entropy(z, y))
            assert row[f"{name}loss"] == pytest.approx(expected, rel=1e-4)
    before, after = (np.array([row[name] for row in rows]) for name in ("accuracy", "personal_accuracy"))
    assert outcome.metrics["clients/accuracy_mean"] == pytest.approx(before.mean())
    assert outcome.metrics["personal/mean"] == pytest.approx(after.mean())
    assert outcome.metrics["personal/gain"] == pytest.approx((after - before).mean())
    last = read_all(tmp_path / "child" / "metrics.jsonl")[-1]
    assert (last["step"], last["metrics"]["personal/helped"]) == (3, (after > before).sum())


@pytest.mark.parametrize("entry", ["fedavg", "fedbuff", "fedbn"])
def test_it_changes_nothing_of_the_run_and_engines_agree(entry: str, tmp_path: Path) -> None:
    """Nor is it disturbed by faults; with fedbn clients start from layers of their own."""
    changes: dict[str, Any] = {"faults": {"drop_out": 0.3, "nan_clients": [1]}, "rounds": 2}
    if entry == "fedbn":
        changes["model"] = {"kind": "resnet", "layers": 1, "width": 8, "groups": 2}
        # So small that what products round differently in both engines stays small.
        changes["local"] = {"epochs": 1, "batch_size": 32, "lr": 0.01}
    plain = trained(tiny(entry, **changes), tmp_path / "plain")
    measured = tiny(entry, **changes, measure={"personalise": 2})
    assert equal(plain, trained(measured, tmp_path / "measured"))
    trained(measured, tmp_path / "apart", OneByOneGrid)
    together, apart = rows_of(tmp_path / "measured"), rows_of(tmp_path / "apart")
    assert [row["client"] for row in together] == list(range(6))
    for one, other in zip(together, apart, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["personal_loss"] == pytest.approx(other["personal_loss"], rel=1e-2)
    assert any(row["personal_loss"] != row["loss"] for row in together)
    totals = [
        read_all(tmp_path / name / "child" / "metrics.jsonl")[2]["metrics"] for name in ("plain", "measured")
    ]
    assert totals[0]["bytes/up"] == totals[1]["bytes/up"]


def test_the_spread_against_its_definition() -> None:
    tests = [PersonalTest(c, 10, 0.5, 1.0, 0.5 + (c % 3 - 1) * 0.1, 1.0) for c in range(20)]
    found = personal_spread(tests, "max")
    after = sorted(one.personal_figure for one in tests)
    assert found["personal/mean"] == pytest.approx(np.mean(after))
    assert found["personal/worst10"] == pytest.approx(np.mean(after[:2]))
    assert (found["personal/helped"], found["personal/hurt"]) == (6, 7)
    assert found["personal/gain"] == pytest.approx(-0.005)
    assert personal_spread([], "max") == {}


def test_where_one_client_has_all_nobody_fine_tunes(tmp_path: Path) -> None:
    """The others have nothing to train on; what is measured besides is there."""
    spec = tiny("centralised", rounds=1, measure={"personalise": 1})
    trained(spec, tmp_path)
    last = read_all(tmp_path / "child" / "metrics.jsonl")[-1]["metrics"]
    assert "personal/mean" not in last
    first = next(row["metrics"] for row in read_all(tmp_path / "child" / "metrics.jsonl") if row["step"] == 1)
    assert first["clients/accuracy_mean"] > 0
