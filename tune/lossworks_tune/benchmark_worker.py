"""One measurement of ``lossworks bench tune``, in a process of its own: ``python -m ... CASE``."""

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lossworks.data import BagOrder, load_examples
from lossworks.losses import create
from lossworks.metrics import class_sums
from lossworks.models import build_classifier
from lossworks.tasks.classification import ClassifierSpec
from lossworks_tune.sweeps.engines.packed import PackedSweep
from lossworks_tune.sweeps.proposals import Proposals
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.sweep import Sweep

TrialReport = Callable[[dict[str, float]], object]


def configurations(spec: SweepSpec) -> list[dict[str, Any]]:
    """Return the specs of all trainings, as plain data; a random search draws them whatever they give."""
    space = spec.make_space()
    proposals, found = Proposals(spec, space), []
    while (configuration := proposals.next()) is not None:
        found.append(space.values(configuration.fields, spec.seeds[0]))
    return found


def train_plainly(values: dict[str, Any], report: TrialReport) -> float:
    """Train one configuration as plain torch code would; return its last accuracy."""
    spec = ClassifierSpec.parse(values)
    data = load_examples(spec.data, spec.seed)
    order = BagOrder(len(data.train), 1, spec.batch_size, spec.seed)
    model = build_classifier(spec.model, shape=data.shape, classes=len(data.names), seed=spec.seed)
    loss = create(spec.loss.name, **spec.loss.hyperparameters)
    optimizer = torch.optim.AdamW(
        model.parameters(), spec.optimizer.lr, **spec.optimizer.hyperparameters, weight_decay=0.0, fused=True
    )
    accuracy = 0.0
    for step in range(1, spec.steps + 1):
        inputs, labels = data.train.batch(order.rows((step - 1) * spec.batch_size, 0, 1)).values()
        optimizer.zero_grad()
        loss(model.logits(inputs), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % spec.evaluation.every == 0 or step == spec.steps:
            with torch.no_grad():
                found = class_sums(model.logits(data.held_out.inputs), data.held_out.labels).metrics()
            accuracy = found["accuracy"]
            report({f"eval/{name}": value for name, value in found.items()})
    return accuracy


def by_loop(spec: SweepSpec, path: Path) -> dict[str, Any]:
    """Train all configurations one after the other."""
    del path
    wanted = configurations(spec)
    train_plainly({**wanted[0], "steps": 5}, lambda metrics: metrics)
    began = time.perf_counter()
    best = max(train_plainly(values, lambda metrics: metrics) for values in wanted)
    return {"seconds": time.perf_counter() - began, "configurations": len(wanted), "best": best}


def by_packed(spec: SweepSpec, path: Path) -> dict[str, Any]:
    """Train all configurations packed."""
    warm = spec.model_copy(update={"base": {**spec.base, "steps": 5}})
    PackedSweep(_sweep(warm, path / "warm")).run()
    sweep = _sweep(spec, path / "sweep")
    began = time.perf_counter()
    PackedSweep(sweep).run()
    seconds = time.perf_counter() - began
    results = sweep.results()
    steps = sum(trial.rows[-1]["step"] for trial in results.trials if trial.rows)
    best = results.ranked[0].value(results.metrics[0])
    return {"seconds": seconds, "configurations": len(results.trials), "best": best, "steps": steps}


def by_packed_confirmed(spec: SweepSpec, path: Path) -> dict[str, Any]:
    """Do the same, and train the winner on fresh seeds."""
    found, sweep = by_packed(spec, path), _sweep(spec, path / "sweep")
    PackedSweep(sweep).confirm(sweep.results().ranked[:1])
    results = sweep.results()
    fresh = results.fresh(results.ranked[0], results.metrics[0])
    return {**found, "fresh": fresh.value if fresh else None}


def _sweep(spec: SweepSpec, path: Path) -> Sweep:
    return Sweep(spec, spec.make_space(), path)


def _trial(config: dict[str, Any]) -> None:
    from ray import tune

    torch.set_num_threads(1)
    train_plainly(config["wanted"][config["index"]], tune.report)


def by_ray_tune(spec: SweepSpec, path: Path) -> dict[str, Any]:
    """Train every configuration in a process of its own, as Ray Tune does."""
    import ray
    from ray import tune

    from lossworks_tune.sweeps.engines.scheduling import build_scheduler

    wanted = configurations(spec)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    began = time.perf_counter()
    grid = tune.Tuner(
        _trial,
        param_space={"wanted": wanted, "index": tune.grid_search(list(range(len(wanted))))},
        tune_config=tune.TuneConfig(scheduler=build_scheduler(_sweep(spec, path))),
        run_config=tune.RunConfig(storage_path=str(path), verbose=0),
    ).fit()
    seconds = time.perf_counter() - began
    best = max(one.metrics[next(iter(spec.objectives))] for one in grid if one.metrics)
    return {"seconds": seconds, "configurations": len(wanted), "best": best}


METHODS: dict[str, Callable[[SweepSpec, Path], dict[str, Any]]] = {
    "packed": by_packed,
    "packed-confirmed": by_packed_confirmed,
    "loop": by_loop,
    "ray-tune": by_ray_tune,
}


def main() -> None:
    """Measure the case in the first argument and print what was found as JSON."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    path = Path(case["folder"])
    path.mkdir()
    found = METHODS[case["method"]](SweepSpec.parse(case["spec"]), path)
    print()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
