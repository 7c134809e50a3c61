"""Small sweeps for tests."""

from pathlib import Path
from typing import Any

from lossworks_testing.classification import tiny
from lossworks_tune.sweeps.engines.packed import PackedSweep
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.sweep import Sweep


def tiny_sweep(**changes: Any) -> SweepSpec:
    """Return a sweep of seconds over two losses and the learning rate; changes replace whole fields."""
    evaluation = {"every": 4, "sequences": 100}
    base = tiny(data={"source": "digits"}, model={"width": 8, "layers": 1}, steps=12, evaluation=evaluation)
    values: dict[str, Any] = {
        "base": base,
        "losses": ["comp-sum", "ldr"],
        "space": {"optimizer.lr": {"log": [1e-3, 1e-1]}},
        "trials": 9,
        "confirm": {"top": 1, "seeds": [50, 51]},
    }
    return SweepSpec.parse({**values, **changes})


def sweep_at(spec: SweepSpec, path: Path) -> Sweep:
    """Return a sweep whose run has a certain folder."""
    return Sweep(spec, spec.make_space(), path)


def packed(spec: SweepSpec, path: Path) -> Results:
    """Run a sweep packed, without confirming, and return what it found."""
    sweep = sweep_at(spec, path)
    PackedSweep(sweep).run()
    return sweep.results()


def results(spec: SweepSpec, path: Path) -> Results:
    """Return what a folder holds."""
    return sweep_at(spec, path).results()


def seen(found: Results) -> list[tuple[Any, ...]]:
    """Return all that trials are: configuration, status, reason, and every row without its time."""
    return [
        (t.configuration, t.status, t.reason, [(row["step"], row["metrics"]) for row in t.rows])
        for t in found.trials
    ]
