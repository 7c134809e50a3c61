"""Flower's own strategies, made repeatable: the classes of ``flwr.serverapp.strategy``."""

from typing import Any

import numpy as np
import torch
from flwr.serverapp import strategy as flower

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.cohort import Member
from lossworks_federated.records import array_record, flattened, grouped, member_from
from lossworks_federated.strategies.interface import Federated, Reproducible


def _step(default: float) -> Any:
    return number(default, "η of the server's step", gt=0, le=10, search=(1e-3, 1), log=True)


class _OfFlower(Federated):
    """A strategy whose hyperparameters are those of Flower's constructor."""

    def flower_arguments(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return self.settings()


class FedAvgM(_OfFlower, flower.FedAvgM, Reproducible):
    """FedAvg with momentum in the server."""

    slug = "fedavgm"
    formula = "v ← β v + Σ p_i g_i, w = w⁰ + η_s v"
    paper = Paper(
        "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        "Hsu, Qi, Brown",
        2019,
    )

    server_learning_rate: float = number(
        1.0, "η_s of the server's step", gt=0, le=10, search=(0.1, 2), log=True
    )
    server_momentum: float = number(0.9, "β; 0 with η_s = 1 is FedAvg", ge=0, lt=1, search=(0, 0.99))

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

    eta: float = _step(0.03)
    tau: float = number(
        1e-3, "τ, added to the root of the second moment", gt=0, le=1, search=(1e-5, 0.1), log=True
    )

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


class _WithMoments(_Adaptive):
    """Has a decay of the first moment, too."""

    beta_1: float = number(0.9, "β₁, decay of the first moment", ge=0, lt=1)
    beta_2: float = number(0.99, "β₂, decay of the second moment", ge=0, lt=1)


_REDDI = Paper("Adaptive Federated Optimization", "Reddi et al.", 2021, "algorithm 2")
_YIN = Paper("Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", "Yin et al.", 2018)


class FedAdagrad(_Adaptive, flower.FedAdagrad, Reproducible):
    """Adagrad on the mean update in the server."""

    slug = "fedadagrad"
    formula = "v ← v + Δ², w = w⁰ + η Δ/(√v + τ), Δ = Σ p_i g_i"
    paper = _REDDI

    eta: float = _step(0.1)


class FedAdam(_WithMoments, flower.FedAdam, Reproducible):
    """Adam on the mean update in the server, with Flower's correction of its bias."""

    slug = "fedadam"
    formula = "m ← β₁ m + (1-β₁) Δ, v ← β₂ v + (1-β₂) Δ², w = w⁰ + η m/(√v + τ), Δ = Σ p_i g_i"
    paper = _REDDI


class FedYogi(_WithMoments, flower.FedYogi, Reproducible):
    """Yogi on the mean update in the server."""

    slug = "fedyogi"
    formula = "m ← β₁ m + (1-β₁) Δ, v ← v - (1-β₂) Δ² sign(v - Δ²), w = w⁰ + η m/(√v + τ), Δ = Σ p_i g_i"
    paper = _REDDI

    eta: float = _step(0.01)


class FedMedian(_OfFlower, flower.FedMedian, Reproducible):
    """Median of each parameter over the clients, all alike."""

    slug = "fedmedian"
    formula = "w = median w_i"
    paper = _YIN
    whole_updates = True


class FedTrimmedAvg(_OfFlower, flower.FedTrimmedAvg, Reproducible):
    """Mean of each parameter without the largest and smallest, all clients alike."""

    slug = "fedtrimmedavg"
    formula = "w = mean w_i without the largest and the smallest β m of each entry"
    paper = _YIN
    whole_updates = True

    beta: float = number(0.2, "β, share of clients left out at either end", ge=0, lt=0.5, search=(0, 0.4))


class Krum(_OfFlower, flower.Krum, Reproducible):
    """The one client's parameters that are nearest to those of its m − f − 2 neighbours."""

    slug = "krum"
    formula = "w = w_i of the least Σ ‖w_i - w_j‖² over its m - f - 2 nearest j"
    paper = Paper(
        "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", "Blanchard et al.", 2017
    )
    whole_updates = True

    num_malicious_nodes: int = integer(0, "f, clients that may lie", ge=0, le=10**6)


def _tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))
