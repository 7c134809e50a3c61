"""Flower's own strategies, made repeatable: the classes of ``flwr.serverapp.strategy``."""

from typing import Any

import numpy as np
import torch
from flwr.serverapp import strategy as flower
from pydantic import Field

from lossworks.cohort import Member
from lossworks.specs import Spec
from lossworks_federated.records import array_record, flattened, grouped, member_from
from lossworks_federated.strategies.interface import Federated, Reproducible


class _OfFlower(Federated):
    """A strategy whose hyperparameters are those of Flower's constructor."""

    def flower_arguments(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return self.settings.model_dump()


class MomentumSettings(Spec):
    """Hyperparameters of FedAvgM."""

    server_learning_rate: float = Field(1.0, gt=0.0, le=10.0, description="η_s of the server's step")
    server_momentum: float = Field(0.9, ge=0.0, lt=1.0, description="β; 0 with η_s = 1 is FedAvg")


class FedAvgM(_OfFlower, flower.FedAvgM, Reproducible):
    """FedAvg with momentum in the server."""

    slug = "fedavgm"
    paper = "Hsu, Qi, Brown 2019, Measuring the Effects of Non-Identical Data Distribution"
    Settings = MomentumSettings

    def server_state(self) -> Member:
        """Return the momentum and the model it belongs to."""
        if self.current_arrays is None:
            return {}
        model = member_from(self.current_arrays)
        momentum = dict(zip(model, map(_tensor, self.momentum_vector or ()), strict=False))
        return flattened({"model": model, "momentum": momentum})

    def restore_server(self, state: Member) -> None:
        """Set them."""
        if state:
            groups = grouped(state, ["momentum"])
            self.current_arrays = array_record(groups["model"])
            self.momentum_vector = [value.numpy() for value in groups["momentum"].values()] or None


class _Adaptive(_OfFlower):
    """Keeps the moments of a server's adaptive steps, which are attributes of Flower's class."""

    m_t: dict[str, np.ndarray] | None
    v_t: dict[str, np.ndarray] | None

    def server_state(self) -> Member:
        """Return both moments."""
        moments = {"m": self.m_t or {}, "v": self.v_t or {}}
        return {name: _tensor(value) for name, value in flattened(moments).items()}

    def restore_server(self, state: Member) -> None:
        """Set them."""
        if state:
            arrays = {name: value.numpy() for name, value in state.items()}
            groups = grouped(arrays, ["m", "v"])
            self.m_t, self.v_t = groups["m"], groups["v"]


class AdagradSettings(Spec):
    """Hyperparameters of FedAdagrad."""

    eta: float = Field(0.1, gt=0.0, le=10.0, description="η of the server's step")
    tau: float = Field(1e-3, gt=0.0, le=1.0, description="τ, added to the root of the second moment")


class AdamSettings(AdagradSettings):
    """Hyperparameters of FedAdam."""

    eta: float = Field(0.03, gt=0.0, le=10.0, description="η of the server's step")
    beta_1: float = Field(0.9, ge=0.0, lt=1.0, description="β₁, decay of the first moment")
    beta_2: float = Field(0.99, ge=0.0, lt=1.0, description="β₂, decay of the second moment")


class YogiSettings(AdamSettings):
    """Hyperparameters of FedYogi."""

    eta: float = Field(0.01, gt=0.0, le=10.0, description="η of the server's step")


_REDDI = "Reddi et al. 2021, Adaptive Federated Optimization"


class FedAdagrad(_Adaptive, flower.FedAdagrad, Reproducible):
    """Adagrad on the mean update in the server."""

    slug = "fedadagrad"
    paper = _REDDI
    Settings = AdagradSettings


class FedAdam(_Adaptive, flower.FedAdam, Reproducible):
    """Adam on the mean update in the server, with Flower's correction of its bias."""

    slug = "fedadam"
    paper = _REDDI
    Settings = AdamSettings


class FedYogi(_Adaptive, flower.FedYogi, Reproducible):
    """Yogi on the mean update in the server."""

    slug = "fedyogi"
    paper = _REDDI
    Settings = YogiSettings


class FedMedian(_OfFlower, flower.FedMedian, Reproducible):
    """Median of each parameter over the clients, all alike."""

    slug = "fedmedian"
    paper = "Yin et al. 2018, Byzantine-Robust Distributed Learning"
    Settings = Spec


class TrimmedSettings(Spec):
    """Hyperparameters of FedTrimmedAvg."""

    beta: float = Field(0.2, ge=0.0, lt=0.5, description="share of clients left out at either end")


class FedTrimmedAvg(_OfFlower, flower.FedTrimmedAvg, Reproducible):
    """Mean of each parameter without the largest and smallest, all clients alike."""

    slug = "fedtrimmedavg"
    paper = "Yin et al. 2018, Byzantine-Robust Distributed Learning"
    Settings = TrimmedSettings


class KrumSettings(Spec):
    """Hyperparameters of Krum."""

    num_malicious_nodes: int = Field(0, ge=0, le=10**6, description="f, clients that may lie")


class Krum(_OfFlower, flower.Krum, Reproducible):
    """The one client's parameters that are nearest to those of its m − f − 2 neighbours."""

    slug = "krum"
    paper = "Blanchard et al. 2017, Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
    Settings = KrumSettings


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
