"""The study of federated strategies: runs federated-study.yaml beside it, writes docs/federated-study.json.

``PYTHONPATH=tests/support python -m lossworks_testing.federated_study`` takes half an hour on two cores; what
is in the file already is not run again.
"""

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

STUDY = Path(__file__).with_name("federated-study.yaml")
RESULTS = Path("docs/federated-study.json")
FIGURES = ("accuracy", "worst10", "rounds_to_target", "bytes_to_target")


def cells(study: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the overrides of every cell."""
    for chosen in itertools.product(*study["cells"].values()):
        yield [f"{key}={json.dumps(value)}" for part in chosen for key, value in part.items()]


def run_one(overrides: list[str], strategy: int, lr: float, seed: int) -> dict[str, float]:
    """Return the figures of one strategy with one seed; a run that diverges has none."""
    import logging

    import torch

    from lossworks.errors import RunError
    from lossworks_federated.engines.cohort_grid import CohortGrid
    from lossworks_federated.reporting.comparison import figures_of
    from lossworks_federated.server.rounds import RoundFiles, Rounds
    from lossworks_federated.shared_setup import setup_of
    from lossworks_federated.specs import FederationSpec, StrategySpec

    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    spec = FederationSpec.parse(yaml.safe_load(STUDY.read_text())["base"]).override(overrides)
    chosen = spec.strategies[strategy].model_copy(update={"lr": lr})
    # Strategies share the setup of a seed; only the learning rate is their own.
    setup = setup_of(spec.task(StrategySpec(), seed).model_dump_json())
    setup = replace(setup, task=spec.task(chosen, seed))
    with tempfile.TemporaryDirectory() as folder:
        files = RoundFiles(Path(folder))
        try:
            Rounds(spec, chosen, setup, CohortGrid(setup), files).run()
        except RunError:
            return dict.fromkeys(FIGURES, math.nan)
        found = figures_of(files.journal, spec.measure.target)
    return {name: found[name] for name in FIGURES}


def main() -> None:
    """Run what is missing, tuning first, and write everything as it comes."""
    study = yaml.safe_load(STUDY.read_text())
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    count = len(study["base"]["strategies"])
    with ProcessPoolExecutor(2) as pool:
        tuning = [
            (cell, strategy, lr, seed)
            for cell in cells(study)
            for seed in study["tuning_seeds"]
            for strategy in range(count)
            for lr in study["lr"]
        ]
        _run_all(pool, tuning, results)
        final = [
            (cell, strategy, best_lr(results, study, cell, strategy), seed)
            for cell in cells(study)
            for seed in study["seeds"]
            for strategy in range(count)
        ]
        _run_all(pool, final, results)


def best_lr(results: dict[str, Any], study: dict[str, Any], cell: list[str], strategy: int) -> float:
    """Return the learning rate with the best mean accuracy on the tuning seeds."""

    def accuracy(lr: float) -> float:
        found = [results[key(cell, strategy, lr, seed)]["accuracy"] for seed in study["tuning_seeds"]]
        mean = sum(found) / len(found)
        return mean if math.isfinite(mean) else -1.0

    return max(study["lr"], key=accuracy)


def key(cell: list[str], strategy: int, lr: float, seed: int) -> str:
    """Return the name of a run in the results."""
    return f"{' '.join(cell)} strategy={strategy} lr={lr:g} seed={seed}"


def _run_all(pool: ProcessPoolExecutor, runs: list[tuple], results: dict[str, Any]) -> None:
    waiting = {pool.submit(run_one, *run): key(*run) for run in runs if key(*run) not in results}
    for done, future in enumerate(as_completed(waiting), 1):
        results[waiting[future]] = future.result()
        if done % 50 == 0 or done == len(waiting):
            partial = RESULTS.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=0, sort_keys=True))
            partial.replace(RESULTS)
            print(f"{done} of {len(waiting)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
