"""``lossworks bench tune``: configurations a minute, packed, by ordinary Ray Tune, and by a bare loop.

All methods train the same configurations of a small perceptron on digits, each method in a fresh process, in
turns. Starting Python, Ray and reading data is left out.
"""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import run_worker
from lossworks.errors import RunError, require_one
from lossworks.specs import Spec

_METHODS = ("packed", "loop", "ray-tune")
_METRIC = "eval/accuracy"
_SAME = 0.02  # difference of best accuracies that is rounding: 450 held-out digits


class TuneSpec(Spec):
    """What ``lossworks bench tune`` measures; methods may be written with commas."""

    methods: Annotated[tuple[str, ...], COMMAS] = Field(_METHODS, description=f"of {', '.join(_METHODS)}")
    configurations: int = Field(64, ge=8, le=10_000, description="configurations of each measurement")
    steps: int = Field(300, ge=3, description="steps of each")
    width: int = Field(64, ge=2, description="hidden units of the perceptron")
    batch_size: int = Field(32, ge=1, description="examples a step")
    asha: bool = Field(True, description="measure early stopping, too, and what it saves")
    threads: int = Field(
        2, ge=1, le=64, description="threads of torch, but of Ray Tune's processes, which have one"
    )
    limit_s: float = Field(1800.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("methods")
    @classmethod
    def _are_known(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(require_one(value, _METHODS, "method") for value in values)


def run(overrides: Sequence[str], repeats: int) -> Iterator[BenchmarkRow]:
    """Yield configurations a minute of every method, ratios, best values, and what early stopping saves."""
    spec = TuneSpec.parse({}).override(overrides)
    with tempfile.TemporaryDirectory() as folder:
        numbers = count()

        def measure(method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
            case = {
                "method": method,
                "spec": _sweep(spec, changes),
                "folder": str(Path(folder) / str(next(numbers))),
                "threads": spec.threads,
            }
            return run_worker("lossworks_tune.benchmark_worker", case, spec.threads, spec.limit_s)

        case = f"{spec.configurations} configurations"
        yield from _compare(case, spec.methods, measure, {}, repeats)
        if spec.asha:
            stopped = [method for method in spec.methods if method != "loop"]
            early = {"scheduler": {"kind": "asha", "reduction": 3.0}}
            yield from _compare(f"{case}, asha", stopped, measure, early, repeats)
            yield from _saved(case, measure, early)


def _sweep(spec: TuneSpec, changes: Mapping[str, Any]) -> dict[str, Any]:
    base = {
        "task": "classification",
        "steps": spec.steps,
        "batch_size": spec.batch_size,
        "workers": 1,
        "sharding": "none",
        "data": {"source": "digits", "label_noise": 0.4},
        "model": {"kind": "mlp", "layers": 1, "width": spec.width},
        "optimizer": {"weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "evaluation": {"every": max(1, spec.steps // 9), "sequences": 1000},
    }
    return {
        "base": base,
        "losses": ["cross-entropy", "comp-sum", "ldr", "tversky"],
        "space": {"optimizer.lr": {"log": [3e-4, 3e-2]}},
        "objectives": {_METRIC: "max"},
        "trials": spec.configurations - 6,  # and six anchors
        "confirm": {"top": 1, "seeds": list(range(1000, 1010))},
        **changes,
    }


def _compare(
    case: str, methods: Sequence[str], measure: Any, changes: Mapping[str, Any], repeats: int
) -> Iterator[BenchmarkRow]:
    """Yield the rows of one case, its methods measured in turns."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    notes: dict[str, str] = {}
    for _ in range(repeats):
        for method in methods:
            try:
                found[method].append(measure(method, changes))
            except RunError as error:
                notes[method] = str(error)
    rates = {
        method: statistics.median(60 * run["configurations"] / run["seconds"] for run in runs)
        for method, runs in found.items()
        if runs
    }
    for method in methods:
        note = notes.get(method, "")
        yield BenchmarkRow(case, method, "configurations_per_minute", rates.get(method), "", note)
    ours = found.get("packed")
    for method in methods:
        if method in rates and method != "packed" and ours:
            yield BenchmarkRow(case, method, "packed over it", rates["packed"] / rates[method], "x")
        if method in rates:
            best = found[method][0]["best"]
            apart = abs(best - ours[0]["best"]) if ours else 0.0
            note = "" if apart < _SAME else f"differs from packed's by {apart:.3f}"
            yield BenchmarkRow(case, method, f"best {_METRIC}", best, "", note)


def _saved(case: str, measure: Any, early: Mapping[str, Any]) -> Iterator[BenchmarkRow]:
    """Yield the steps that early stopping takes, and how its winner does on fresh seeds."""
    case = f"{case}, what asha saves"
    found = {
        name: measure("packed-confirmed", changes) for name, changes in (("random", {}), ("asha", early))
    }
    for name, one in found.items():
        yield BenchmarkRow(case, name, "steps", one["steps"], "")
        yield BenchmarkRow(case, name, f"winner's {_METRIC} on 10 fresh seeds", one["fresh"], "")
    yield BenchmarkRow(
        case, "asha", "steps over random's", found["asha"]["steps"] / found["random"]["steps"], "x"
    )


# Once: ordinary Ray Tune takes four minutes of each turn.
TUNE = Benchmark("configurations a minute: packed, ordinary Ray Tune, and a bare loop", run, 1)
