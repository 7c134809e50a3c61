"""The benchmark's methods do the same work, and its rows have the names that others read."""

import math
from pathlib import Path
from typing import Any

import pytest

from lossworks.benchmarks.table import BenchmarkRow
from lossworks.errors import RunError, UserError
from lossworks_federated.benchmarks import engines_benchmark as benchmark
from lossworks_federated.benchmarks.engines_chart import draw_benchmark
from lossworks_federated.benchmarks.engines_worker import by_cohort, rounds_by_loop
from lossworks_federated.shared_setup import make_setup
from lossworks_federated.specs import FederationSpec


def test_the_bare_loop_does_what_the_cohort_does() -> None:
    spec = FederationSpec.parse(
        {
            "rounds": 2,
            "clients_per_round": 3,
            "split": {"kind": "dirichlet", "clients": 5, "alpha": 0.3, "min_size": 8},
            "local": {"epochs": 1, "batch_size": 32, "lr": 0.1},
        }
    )
    setup = make_setup(spec.told(spec.strategies[0], 0))
    ours, theirs = by_cohort(spec, setup), rounds_by_loop(spec, setup)
    assert len(ours["seconds"]) == len(theirs["seconds"]) == 2
    assert all((ours["model"][name] - value).abs().max() < 1e-4 for name, value in theirs["model"].items())


@pytest.mark.slow
def test_rows_of_a_small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"data": {"source": "digits"}, "model": {"kind": "mlp", "layers": 1, "width": 8}}
    monkeypatch.setitem(benchmark._MAIN, "mlp-100-20", small)
    rows = list(benchmark.run(["cases=mlp-100-20", "methods=cohort,loop", "rounds=3", "large=false"], 1))
    found = {(row.case, row.method, row.metric): row for row in rows}
    assert set(found) == {
        ("mlp-100-20", "cohort", "seconds_per_round"),
        ("mlp-100-20", "loop", "seconds_per_round"),
        ("mlp-100-20", "loop", "over cohort"),
        ("mlp-100-20", "loop", "difference of updates"),
    }
    assert all(row.value is not None and math.isfinite(row.value) and not row.note for row in rows)


def test_every_case_is_the_spec_of_a_federation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take long to measure, too; a worker would refuse what is none."""
    told = []

    def told_only(module: str, case: dict[str, Any], threads: int, limit_s: float) -> dict[str, Any]:
        told.append(FederationSpec.parse(case["spec"]))
        raise RunError("not measured")

    monkeypatch.setattr(benchmark, "run_worker", told_only)
    rows = list(benchmark.run(["curves=true"], 1))
    assert {row.note for row in rows} <= {"not measured", "not installed: pip install 'lossworks[bench]'"}
    assert len(told) > 20
    assert {spec.task for spec in told} == {"classification", "language-model"}


def test_unknown_cases_and_methods_are_refused() -> None:
    for wrong in ("cases=mlp", "methods=cohort,flour"):
        with pytest.raises(UserError):
            list(benchmark.run([wrong], 1))


def test_the_chart_draws_bars_and_curves(tmp_path: Path) -> None:
    rows = [
        BenchmarkRow("mlp-100-20", method, "seconds_per_round", 0.1, "s") for method in ("cohort", "flower")
    ]
    rows += [
        BenchmarkRow(f"{n} clients a round", "cohort", "seconds_per_round", n / 1e3, "s") for n in (10, 100)
    ]
    rows += [
        BenchmarkRow("10 clients a round, 10k parameters", "loop", "seconds_per_round", None, "s", "too slow")
    ]
    assert draw_benchmark(rows, tmp_path / "chart.png").stat().st_size > 10_000
