"""``lossworks bench federated``: seconds a round of the cohort engine, a bare loop, Flower's engine and pfl.

All methods take the same batches of the same clients, each in a fresh process, in turns. The first round is
left out: it fills caches.
"""

import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import run_worker
from lossworks.errors import RunError, require_one
from lossworks.specs import Spec

_PER_CLIENT = 40  # examples
_BLOBS_TRAINED = 0.75
_LOCAL = {"epochs": 5, "batch_size": 16, "lr": 0.1}
_MAIN: dict[str, dict[str, Any]] = {
    "mlp-100-20": {"data": {"source": "mnist1d"}, "model": {"kind": "mlp", "layers": 2, "width": 100}},
    "cnn-100-20": {"data": {"source": "mnist1d"}, "model": {"kind": "cnn", "layers": 2, "width": 32}},
}
_METHODS = ("cohort", "loop", "flower", "pfl")
_BOTH = ("cohort", "loop")
_SAME = 1e-2  # difference of updates, as a share, at which methods count as having done the same: rounding
# can put a ReLU on its other side, after which one weight takes another step
_TEXT: dict[str, Any] = {
    "task": "language-model",
    "data": {"corpus": "stdlib", "max_bytes": 60_000, "vocab_size": 512, "sequence_length": 64},
    "split": {"kind": "iid", "clients": 20, "test_fraction": 0.0},
    "model": {"layers": 2, "width": 64, "heads": 4},
    "local": {"epochs": 1, "batch_size": 8, "lr": 0.1},
}
_WIDTHS = {"10k": 80, "100k": 290, "1M": 975, "10M": 3140}


class FederatedSpec(Spec):
    """What ``lossworks bench federated`` measures; lists may be written with commas."""

    cases: Annotated[tuple[str, ...], COMMAS] = Field(
        tuple(_MAIN), description=f"of {', '.join(_MAIN)}: 100 clients, 20 a round, 5 local epochs"
    )
    methods: Annotated[tuple[str, ...], COMMAS] = Field(
        _METHODS, description=f"of {', '.join(_METHODS)}; pfl (Apple's simulator) where it is installed"
    )
    rounds: int = Field(6, ge=3, le=1000, description="rounds of each measurement, the first left out")
    large: bool = Field(
        True, description="measure a language model and perceptrons of 1M and 10M parameters, too"
    )
    curves: bool = Field(
        False,
        description="measure cohort sizes, small models, unequal clients, 10,000 clients and FedLD, too, for "
        "a quarter of an hour",
    )
    threads: int = Field(2, ge=1, le=64, description="threads of torch")
    limit_s: float = Field(600.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("cases", "methods")
    @classmethod
    def _are_known(cls, values: tuple[str, ...], info: Any) -> tuple[str, ...]:
        known = {"cases": list(_MAIN), "methods": list(_METHODS)}[info.field_name]
        return tuple(require_one(value, known, info.field_name.removesuffix("s")) for value in values)


def run(overrides: Sequence[str], repeats: int) -> Iterator[BenchmarkRow]:
    """Yield seconds a round of every method and case, ratios to the cohort engine, and how weights differ."""
    spec = FederatedSpec.parse({}).override(overrides)
    with tempfile.TemporaryDirectory() as folder:
        workers = _Workers(spec, Path(folder))
        for case in spec.cases:
            changes = {"split": _split(100, "iid"), "clients_per_round": 20, **_MAIN[case]}
            yield from _compare(workers, case, changes, spec.methods, repeats)
        if spec.large:
            yield from _large(workers)
        if spec.curves:
            yield from _curves(workers)


class _Workers:
    """Runs measurements in processes of their own."""

    def __init__(self, spec: FederatedSpec, folder: Path) -> None:
        self.spec, self._folder, self._number = spec, folder, count()

    def measure(self, method: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a worker found, with the path of the final model."""
        model = self._folder / f"{next(self._number)}.safetensors"
        unmeasured = {"terms": False}
        values = {"rounds": self.spec.rounds, "local": _LOCAL, "measure": unmeasured, **changes}
        case = {"method": method, "spec": values, "model": str(model), "threads": self.spec.threads}
        module = "lossworks_federated.benchmarks.engines_worker"
        return {**run_worker(module, case, self.spec.threads, self.spec.limit_s), "model": model}


def _compare(
    workers: _Workers, case: str, changes: Mapping[str, Any], methods: Sequence[str], repeats: int
) -> Iterator[BenchmarkRow]:
    """Yield the rows of one case, its methods measured in turns; peers that take minutes to start once."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    notes: dict[str, str] = {}
    if "pfl" in methods and find_spec("pfl") is None:
        notes["pfl"] = "not installed: pip install 'lossworks[bench]'"
    for turn in range(repeats):
        for method in methods:
            if method in notes or (turn and method not in _BOTH):
                continue
            try:
                found[method].append(workers.measure(method, changes))
            except RunError as error:
                notes[method] = str(error)
    medians = {method: _seconds(runs) for method, runs in found.items() if runs}
    for method in methods:
        yield BenchmarkRow(case, method, "seconds_per_round", medians.get(method), "s", notes.get(method, ""))
    ours = medians.get("cohort")
    for method in methods:
        if ours is not None and method != "cohort" and method in medians:
            yield BenchmarkRow(case, method, "over cohort", medians[method] / ours, "x")
            yield _weights(case, method, found)


def _seconds(runs: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median(float(statistics.median(run["seconds"][1:])) for run in runs)


def _weights(case: str, method: str, found: Mapping[str, list[dict[str, Any]]]) -> BenchmarkRow:
    """Return how far a method's weights end from the cohort engine's, as a share of how far these went."""
    from lossworks.tensors import load_tensors

    ours, theirs = (load_tensors(found[name][0]["model"]) for name in ("cohort", method))
    apart = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours) ** 0.5
    share = apart / found["cohort"][0]["moved"]
    note = "" if share < _SAME else f"more than {_SAME:g}: it has not done the same"
    return BenchmarkRow(case, method, "difference of updates", share, "", note)


def _split(clients: int, kind: str) -> dict[str, Any]:
    return {"kind": kind, "clients": clients, "test_fraction": 0.0, "alpha": 0.5, "min_size": 2}


def _blobs(clients: int, width: int, kind: str = "iid") -> dict[str, Any]:
    """Return a task whose clients have 40 examples each, on average."""
    examples = int(clients * _PER_CLIENT / _BLOBS_TRAINED)
    return {
        "data": {"source": f"blobs:{examples}"},
        "split": _split(clients, kind),
        "model": {"kind": "mlp", "layers": 2, "width": width},
    }


def _large(workers: _Workers) -> Iterator[BenchmarkRow]:
    few = {"rounds": 3}
    yield from _compare(workers, "transformer, 20 clients a round", {**_TEXT, **few}, _BOTH, 1)
    for size, epochs in (("1M", 5), ("10M", 2)):
        changes = {**_blobs(10, _WIDTHS[size]), "local": {**_LOCAL, "epochs": epochs}, **few}
        yield from _compare(workers, f"10 clients a round, {size} parameters", changes, _BOTH, 1)


def _curves(workers: _Workers) -> Iterator[BenchmarkRow]:
    few = {"rounds": 3}
    for clients in (10, 30, 100, 300, 1000):
        yield from _compare(workers, f"{clients} clients a round", {**_blobs(clients, 80), **few}, _BOTH, 1)
    for kind, words in (("iid", "equal"), ("quantity", "unequal")):
        changes = {**_blobs(100, 80, kind), **few}
        yield from _compare(workers, f"100 clients a round, {words} sizes", changes, _BOTH, 1)
    for size in ("10k", "100k"):
        changes = {**_blobs(10, _WIDTHS[size]), **few}
        yield from _compare(workers, f"10 clients a round, {size} parameters", changes, _BOTH, 1)
    yield from _many(workers)
    yield from _server_step(workers)


def _many(workers: _Workers) -> Iterator[BenchmarkRow]:
    """Yield what 10,000 clients cost, 100 of them a round."""
    case = "10,000 clients, 100 a round"
    try:
        found = workers.measure("cohort", {**_blobs(10_000, 64), "clients_per_round": 100})
    except RunError as error:
        yield BenchmarkRow(case, "cohort", "seconds_per_round", None, "s", str(error))
        return
    yield BenchmarkRow(case, "cohort", "seconds_per_round", statistics.median(found["seconds"][1:]), "s")
    yield BenchmarkRow(case, "cohort", "peak memory", found["peak_bytes"] / 2**20, "MiB")


def _server_step(workers: _Workers) -> Iterator[BenchmarkRow]:
    """Yield the share of a round that FedLD's aggregation takes."""
    case = "FedLD, 100 clients a round, 1M parameters"
    changes = {**_blobs(100, _WIDTHS["1M"]), "strategies": ["fedld"], "rounds": 3}
    try:
        found = workers.measure("cohort", changes)
    except RunError as error:
        yield BenchmarkRow(case, "cohort", "server step over round", None, "", str(error))
        return
    share = statistics.median(
        server / whole for server, whole in zip(found["server"][1:], found["seconds"][1:], strict=True)
    )
    yield BenchmarkRow(case, "cohort", "seconds_per_round", statistics.median(found["seconds"][1:]), "s")
    yield BenchmarkRow(case, "cohort", "server step over round", share, "")


def _draw(rows: Sequence[BenchmarkRow], path: Path) -> object:
    from lossworks_federated.benchmarks.engines_chart import draw_benchmark

    return draw_benchmark(rows, path)


FEDERATED = Benchmark(
    "rounds of the cohort engine beside a bare loop over clients, Flower's engine and pfl", run, 2, _draw
)
