"""Rounds of Apple's pfl simulator on the clients and batches that ``lossworks bench federated`` gives all.

pfl is no dependency: it is measured where it is installed, which the extra ``bench`` does.
"""

import time
from collections.abc import Iterator
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDatasetBase
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from lossworks.models import HeadedModel
from lossworks_federated.server.rounds import build_strategy
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.interface import Federated


class _Module(nn.Module):
    """A classifier with the loss that pfl asks for."""

    def __init__(self, model: HeadedModel) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model.logits(inputs), labels)

    def metrics(self, inputs: Tensor, labels: Tensor) -> dict[str, Any]:
        del inputs, labels
        return {}


class _User(Dataset):
    """One client's examples in one round, which come in the planned batches of all local epochs."""

    def __init__(self, setup: SharedSetup, number: int, client: int) -> None:
        rows = setup.split.train[client]
        own = setup.train.batch(rows)
        super().__init__(raw_data=[own["inputs"], own["targets"]], user_id=str(client))
        self._setup, self._number, self._client = setup, number, client

    def iter(self, batch_size: int | None) -> Iterator[list[Tensor]]:
        del batch_size
        for rows in self._setup.batches_of(self._client, self._number):
            own = self._setup.train.batch(rows.numpy())
            yield [own["inputs"], own["targets"]]


class _Users(FederatedDatasetBase):
    """The clients that a strategy draws, round after round."""

    def __init__(self, spec: FederationSpec, setup: SharedSetup, strategy: Federated) -> None:
        super().__init__()
        self._spec, self._setup, self._strategy, self._number = spec, setup, strategy, 0

    def __next__(self) -> tuple[Dataset, int]:
        raise NotImplementedError("clients are asked for by the round")

    def get_cohort(self, cohort_size: int) -> Iterator[tuple[Dataset, int]]:
        del cohort_size
        self._number += 1
        nodes = [(client, client) for client in range(self._spec.split.clients)]
        for client, _ in self._strategy.drawn(nodes, self._spec.clients_per_round, self._number):
            yield _User(self._setup, self._number, client), 0


class _Clock(TrainingProcessCallback):
    """Keeps the seconds of every round."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_begin(self, *, model: Any) -> Metrics:
        del model
        self._last = time.perf_counter()
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        del aggregate_metrics, model, central_iteration
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        return False, Metrics()


def federate_by_pfl(spec: FederationSpec, setup: SharedSetup) -> dict[str, Any]:
    """Do the rounds of FedAvg in pfl's simulation, in one process as its authors advise for one machine."""
    task = setup.task
    model = setup.kind.build_model()
    module, clock = _Module(model), _Clock()
    users = _Users(spec, setup, build_strategy(spec, spec.strategies[0], task))
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=spec.rounds,
            evaluation_frequency=10 * spec.rounds,
            train_cohort_size=spec.clients_per_round or spec.split.clients,
            val_cohort_size=None,
        ),
        SimulatedBackend(users, users, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0)),
        # One pass over what a client gives: its batches are those of all epochs.
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.local.lr, local_batch_size=task.local.batch_size
        ),
        None,
        [clock],
        send_metrics_to_platform=False,
    )
    ended = {name: value.detach() for name, value in model.named_parameters()}
    return {"seconds": clock.seconds, "server": [], "model": ended}
