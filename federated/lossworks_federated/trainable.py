"""Federations as a sweep varies them: one strategy, its rounds in the process that asks for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossworks.errors import UserError
from lossworks.tasks.registry import task_class
from lossworks.trainables import Direction, StepReport, Trainable
from lossworks_federated.specs import FederationSpec

_COSTS: dict[str, Direction] = {"bytes/down": "min", "bytes/up": "min", "train/loss": "min"}


def _parse(values: Mapping[str, Any], source: str) -> FederationSpec:
    spec = FederationSpec.parse(values, source=source)
    if len(spec.strategies) != 1:
        raise UserError(f"{source}: strategies: sweeps and studies take federations of one strategy each")
    if spec.engine == "flower":
        raise UserError(f"{source}: engine={spec.engine}: sweeps and studies train in their own process")
    return spec


def _seeded(values: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**values, "seeds": [seed]}


def _steps(spec: FederationSpec) -> int:
    return spec.rounds


def _cpus(spec: FederationSpec) -> float:
    del spec
    return 1.0


def _yardsticks(spec: FederationSpec) -> Mapping[str, Direction]:
    kind = task_class(spec.task)
    found = {f"server/{name.removeprefix('eval/')}": best for name, best in kind.yardsticks.items()}
    tracked = kind.compared_by()
    best, of_clients = kind.yardsticks[tracked], f"clients/{tracked.removeprefix('eval/')}"
    worst = "min" if best == "max" else "max"
    found |= {f"{of_clients}_{which}": best for which in ("mean", "weighted", "worst10", worst)}
    return {**found, f"{of_clients}_std": "min", **_COSTS}


def _train(spec: FederationSpec, path: Path, report: StepReport) -> None:
    from lossworks.tracking import rows_while
    from lossworks_federated.server.participants import participants_of
    from lossworks_federated.server.rounds import RoundFiles

    (strategy,), (seed,) = spec.strategies, spec.seeds
    files, taking = RoundFiles(path), participants_of(spec)
    taking.check(deployed=False)
    rounds = taking.rounds(strategy, seed, taking.grid(strategy, seed, path / "clients"), files)
    for row in rows_while(files.journal, rounds.run):
        if row["step"] > 0 and any(name.startswith("server/") for name in row["metrics"]):
            report(row["step"], row["metrics"])


TRAINABLE = Trainable(
    parse=_parse, seeded=_seeded, steps=_steps, cpus=_cpus, yardsticks=_yardsticks, train=_train
)
