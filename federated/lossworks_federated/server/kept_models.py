"""The global model of a strategy and seed as a run of training: what exports, predicts and begins others."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tensors import load_tensors, metadata_of, write_tensors
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.distributed.world import World
from lossworks.training.outcome import Outcome
from lossworks.training.weights.adapters import equip
from lossworks_federated.shared_setup import SharedSetup


class BestModel:
    """The global model with the least held-out loss so far, in a file; it goes on where a run was stopped.

    A round that is done again after a stop gives the same model, so what is kept is the same, too.

    Args:
        file: Where it is kept.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.loss = math.inf
        if file.is_file():
            self.loss = float(metadata_of(file)["loss"])

    def offer(self, server_round: int, loss: float, model: Member) -> None:
        """Keep a model if its loss is less than that of all before."""
        if loss < self.loss:
            write_tensors(self._file, model, round=str(server_round), loss=repr(loss))
            self.loss = loss

    def read(self) -> tuple[int, Member] | None:
        """Return the best round and its model; None if no loss was finite.

        Raises:
            RunError: The file is damaged.
        """
        if not self._file.is_file():
            return None
        return int(metadata_of(self._file)["round"]), load_tensors(self._file)


def keep_as_run(
    setup: SharedSetup,
    run_id: str,
    *,
    name: str,
    storage: str | None,
    best: BestModel,
    last: tuple[int, Member],
    metrics: Mapping[str, float],
) -> RunFolder:
    """Make a run of training out of a global model, whose checkpoints are the best round's and the last's.

    ``lossworks export``, ``predict``, ``evaluate``, ``generate`` and ``start=RUN`` take it like any other.

    Args:
        setup: What the clients had in common.
        run_id: Of the strategy and seed in MLflow, which names the folder.
        name: Of the run.
        storage: Folder of runs; that in the home folder if None.
        best: With the least held-out loss.
        last: The last round and its model.
        metrics: The last round's.

    Raises:
        StorageError: It can't be written.
        RunError: What was kept is damaged.
    """
    rounds, model = last
    spec = _as_training(setup.kind.spec_of_run, name, storage, rounds)
    folder = RunFolder.at(spec, run_id)
    if not folder.path.exists():
        folder = RunFolder.create(spec, run_id)
    setup.kind.learnt.write(folder.learnt)
    store = CheckpointStore(folder.checkpoints, keep=1)
    found = best.read()
    loss = metrics.get("server/loss", math.nan)
    if found is not None and found[0] != rounds:
        _save(store, setup, found[0], found[1], best.loss)
    _save(store, setup, rounds, model, loss)
    Outcome("finished", "", rounds, dict(metrics), None, None).write(folder.outcome_file)
    return folder


def _save(store: CheckpointStore, setup: SharedSetup, server_round: int, model: Member, loss: float) -> None:
    whole = setup.kind.build_model()
    equip(whole, setup.kind.spec_of_run, setup.kind.objective)
    own = dict(whole.named_parameters())
    if own.keys() < model.keys():
        raise RunError(f"the model of round {server_round} has parameters that its architecture has not")
    with torch.no_grad():
        for name, value in model.items():
            own[name].copy_(value)
    store.save(whole, (), World.current(), step=server_round, position=0, held_out_loss=loss)


def _as_training(spec: RunSpec, name: str, storage: str | None, rounds: int) -> RunSpec:
    values = spec.model_dump(mode="json", exclude_unset=True)
    values |= {"name": name[:100], "storage": storage, "steps": rounds}
    values["schedule"] = {"warmup_steps": 0, "decay_steps": 0}
    return type(spec).parse(values, source="the model of a federation")
