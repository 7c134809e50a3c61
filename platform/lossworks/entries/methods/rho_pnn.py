"""ρ-PNN: a network is tuned band by band, and a switch with two thresholds turns the spatial loss on and off.

Symbols: L_λ the spectral loss, L_S the spatial one, L0 the spectral loss of the interpolated band, β the
weight of L_S, C bands.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, choice, number
from lossworks.catalogue.registry import create
from lossworks.data.batch import Batch, on
from lossworks.data.cubes.scenes import Cube
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.metrics.cubes import ergas, spectral_angle
from lossworks.models import HeadedModel, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Mode, Task
from lossworks.tasks.methods import Method, Trained

_TERMS = ("spectral-consistency", "pan-correlation")
_LEAST = 8  # β is never less than its start over so much


def switched(on_before: bool, spectral: float, first: float, gamma: float, gamma_low: float) -> bool:
    """Return whether the spatial loss is on: below γ·γ_l·L0 it goes on, above γ·L0 off, between it stays.

    Args:
        on_before: Whether it was on.
        spectral: L_λ now.
        first: L0.
        gamma: γ.
        gamma_low: γ_l, below 1.
    """
    if spectral < gamma * gamma_low * first:
        return True
    return on_before and spectral <= gamma * first


def budgets(bands: np.ndarray, steps: int, eta: float) -> np.ndarray:
    """Return the most steps that each band gets, int64 (C,), together at most ``steps``.

    They are N1·(1 + η·(1 − c_b)/mean(1 − c)), with c_b the correlation of a coarse band with the one before,
    so that bands like their neighbour get few; the first band gets as many as the second.

    Args:
        bands: Coarse, shape (C, h, w).
        steps: Of all bands; N1 = steps/(C·(1 + η)).
        eta: η.
    """
    flat = bands.reshape(len(bands), -1).astype(np.float64)
    flat = flat - flat.mean(1, keepdims=True)
    norms = np.linalg.norm(flat, axis=1)
    products = (flat[1:] * flat[:-1]).sum(1)
    c = products / np.maximum(norms[1:] * norms[:-1], np.finfo(float).tiny)
    unlike = 1 - np.concatenate((c[:1], c))
    mean = unlike.mean()
    shares = 1 + eta * (unlike / mean if mean > 0 else np.ones_like(unlike))
    found: np.ndarray = np.maximum(1, np.floor(steps * shares / shares.sum())).astype(np.int64)
    return found


class RhoPnn(Method):
    """ρ-PNN: zero-shot pansharpening band by band, at a set level of spectral error.

    Needs ``loss: [spectral-consistency, pan-correlation]`` and one worker. A band's steps end after its
    budget or once n_s steps were taken with the spatial loss on; the run's ``steps`` are the budgets of all
    bands, N1 = steps/(C·(1 + η)) and n_s = N1/4, so that the paper's n_s = 20 and η = 30 are C·2480 steps.
    Weights pass on from band to band. β is looked for once, when L_λ first falls below the lower threshold:
    from β0 on it is halved, to β0/8 at least, until two steps with it on a copy of the network (Adam with a
    state of its own, where the released code copies that of the optimiser) leave L_λ below ε times what it
    was. From then on a moving average of the weights gives the sharpened band, which the run keeps as
    ``sharp``.

    Use it for one image at hand, since nothing is learnt for others: on drawn scenes its ERGAS was a sixth
    below that of cubic interpolation, and a constant weight of the spatial loss was worse than interpolation.

    ``switching=constant`` keeps the spatial loss on at β0 from the start, for comparison.
    """

    slug = "rho-pnn"
    formula = "L_λ + s β L_S, s on below γ γ_l L0, off above γ L0"
    paper = Paper(
        "Zero-Shot Hyperspectral Pansharpening Using Hysteresis-Based Tuning for Spectral Quality Control",
        "Guarino, Ciotola, Vivone, Scarpa",
        2025,
    )
    example = "lossworks train jobs/specs/pansharpen.yaml"
    newest: ClassVar[bool] = True
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "rho/ergas": "min",
        "rho/sam": "min",
        "rho/worst_spectral": "min",
        "rho/spread": "min",
    }

    gamma: float = number(
        0.65, "γ: L_λ over L0 above which the spatial loss goes off", gt=0, search=(0.4, 0.9)
    )
    gamma_low: float = number(0.9, "γ_l: factor of γ below which it goes on", gt=0, le=1, search=(0.8, 0.95))
    beta: float = number(2.0, "β0: largest weight of the spatial loss", gt=0, search=(0.5, 4), log=True)
    epsilon: float = number(1.007, "ε: by what factor two steps may raise L_λ", ge=1, search=(1.001, 1.05))
    eta: float = number(30.0, "η: how much more steps bands get that differ from the last", ge=0)
    average: float = number(0.95, "share of the averaged weights that stays at each step", ge=0, lt=1)
    rate: float = number(1e-3, "learning rate of the two steps that try a β", gt=0)
    switching: str = choice("hysteresis", "how the spatial loss is turned on", ("hysteresis", "constant"))

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self._cube: Cube | None = None
        self._model: HeadedModel | None = None
        # Band, steps in it, steps with the spatial loss on, whether it is on, β (0 until it is found), L0,
        # whether weights are averaged yet.
        self._at = torch.zeros(7, dtype=torch.float64)
        self._averaged: dict[str, Tensor] = {}
        self._sharp = torch.zeros(0)
        self._steps = np.zeros(0, dtype=np.int64)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Method.check`."""
        super().check(task, spec)
        if tuple(term.name for term in spec.loss.terms) != _TERMS:
            raise UserError(f"methods: {self.slug} needs loss: [{', '.join(_TERMS)}], not {spec.loss.titles}")
        if spec.workers != 1:
            raise UserError(f"methods: {self.slug} tunes one band at a time: workers=1, not {spec.workers}")

    def fit_to(self, task: Task, model: HeadedModel) -> None:
        """See :meth:`Method.fit_to`."""
        self._sharp = torch.from_numpy(cast("Cube", task.train).smooth).clone()
        self._averaged = {name: value.detach().clone() for name, value in model.named_parameters()}
        self._begin(0)

    def start(self, task: Task, model: nn.Module) -> None:
        """See :meth:`Method.start`."""
        self._cube = cast("Cube", task.train)
        self._model = cast("HeadedModel", getattr(model, "module", model))
        self._steps = budgets(self._cube.bands, task.spec_of_run.steps, self.eta)

    @property
    def ended(self) -> bool:
        """See :attr:`Method.ended`: all bands are done."""
        return len(self._sharp) > 0 and int(self._at[0]) >= len(self._sharp)

    def _begin(self, band: int) -> None:
        """Begin a band: nothing is carried over from the last one but the weights and β."""
        beta = self._at[4] if self.switching == "hysteresis" else torch.tensor(self.beta)
        on_at_once = self.switching == "constant"
        self._at = torch.tensor([band, 0, 0, on_at_once, float(beta), 0, 0], dtype=torch.float64)

    def batch(self, batch: Batch, step: int) -> Batch:
        """See :meth:`Method.batch`; the band whose turn it is."""
        del step
        if self._cube is None:
            raise ValueError(f"{self.slug} has not been started")
        band = min(int(self._at[0]), len(self._cube) - 1)
        return on(batch["inputs"].device, self._cube.batch(np.array([band])))

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """See :meth:`Method.loss`; the spatial loss has the weight that the switch gives it."""
        spectral, spatial = (loss.sums(outputs, batch) for loss in objective.terms)
        objective.sizes = [1, 1]
        if self.switching == "hysteresis":
            self._decide(float(spectral.detach()), batch, objective)
        return torch.cat((spectral, float(self._at[3]) * float(self._at[4]) * spatial))

    def _decide(self, spectral: float, batch: Batch, objective: Objective) -> None:
        """Turn the spatial loss on or off, and look for β when it is first to be on."""
        if self._at[1] == 0:
            smooth = Outputs(batch["inputs"], None, dense=batch["inputs"][:, :1].movedim(1, -1))
            self._at[5] = float(objective.terms[0].sums(smooth, batch))
        first = float(self._at[5])
        now = switched(bool(self._at[3]), spectral, first, self.gamma, self.gamma_low)
        if now and self._at[4] == 0:
            self._at[4] = self._found_beta(spectral, batch, objective)
        self._at[3] = float(now)

    @torch.enable_grad()
    def _found_beta(self, before: float, batch: Batch, objective: Objective) -> float:
        """Return the first β of β0, β0/2, … that two steps with it keep L_λ below ε times what it was."""
        beta = self.beta
        while (
            beta > self.beta / _LEAST
            and self._after_two_steps(beta, batch, objective) > self.epsilon * before
        ):
            beta /= 2
        return beta

    def _after_two_steps(self, beta: float, batch: Batch, objective: Objective) -> float:
        trial = deepcopy(cast("HeadedModel", self._model))
        optimizer = torch.optim.Adam(trial.parameters(), lr=self.rate)
        for _ in range(2):
            optimizer.zero_grad()
            outputs = trial.outputs(batch["inputs"])
            spectral, spatial = (loss.sums(outputs, batch).sum() for loss in objective.terms)
            (spectral + beta * spatial).backward()
            optimizer.step()
        with torch.no_grad():
            return float(objective.terms[0].sums(trial.outputs(batch["inputs"]), batch))

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """See :meth:`Method.after_step`; a band ends after its budget, or n_s steps with the switch on."""
        del model, step
        self._at[1] += 1
        self._at[2] += self._at[3]
        if self._at[4]:
            self._average_weights()
        band = int(self._at[0])
        enough = max(1.0, float(self._steps.sum()) / (len(self._steps) * (1 + self.eta)) / 4)
        if self._at[1] >= self._steps[band] or self._at[2] >= enough:
            self._sharp[band] = self._sharpened(band)
            self._begin(band + 1)

    def _average_weights(self) -> None:
        own = dict(cast("HeadedModel", self._model).named_parameters())
        share = 1 - self.average if self._at[6] else 1.0  # the first of a band are taken as they are
        self._at[6] = 1
        for name, value in self._averaged.items():
            value.lerp_(own[name].detach(), share)

    def _sharpened(self, band: int) -> Tensor:
        """Return a band (H, W) as the averaged weights sharpen it, or the newest where there are none."""
        inputs = cast("Cube", self._cube).batch(np.array([band]))["inputs"]
        model = cast("HeadedModel", self._model)
        inputs = inputs.to(next(model.parameters()).device)
        if not self._at[6]:
            return model.hidden(inputs)[0, ..., 0].cpu()
        state = {**model.state_dict(), **self._averaged}
        arguments = ({"inputs": inputs}, lambda outputs, _: outputs.hidden)
        found: Tensor = torch.func.functional_call(model, state, arguments)
        return found[0, ..., 0].cpu()

    def finish(self, trained: Trained) -> Finding:
        """Return what the sharpened cube is worth beside interpolation, and how its bands differ."""
        del trained
        cube = cast("Cube", self._cube)
        ratios = _spectral_ratios(self._sharp, cube)
        finding = {
            "rho/worst_spectral": float(ratios.max()),
            "rho/spread": float(ratios.std(unbiased=False)),
            "rho/bands_done": float(self._at[0]),
        }
        if cube.truth is not None:
            truth, smooth = torch.from_numpy(cube.truth), torch.from_numpy(cube.smooth)
            finding |= {"rho/ergas": ergas(self._sharp, truth, cube.ratio)}
            finding |= {"rho/sam": spectral_angle(self._sharp, truth)}
            finding |= {"rho/interpolated_ergas": ergas(smooth, truth, cube.ratio)}
            finding |= {"rho/interpolated_sam": spectral_angle(smooth, truth)}
        return Finding(finding)

    def result(self) -> dict[str, Tensor]:
        """See :meth:`Method.result`; the sharpened cube (C, H, W) in the unit of the bands."""
        return {"sharp": self._sharp * cast("Cube", self._cube).scale}

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Method.state`."""
        averaged = {f"averaged.{name}": value.clone() for name, value in self._averaged.items()}
        return {"at": self._at.clone(), "sharp": self._sharp.clone(), **averaged}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Method.load_state`."""
        self._at, self._sharp = state["at"].clone(), state["sharp"].clone()
        self._averaged = {
            name.removeprefix("averaged."): value.clone()
            for name, value in state.items()
            if name.startswith("averaged.")
        }


@torch.no_grad()
def _spectral_ratios(sharp: Tensor, cube: Cube) -> Tensor:
    """Return L_λ over L0 of each band, (C,); of a band whose interpolation is perfect 1."""
    loss = create("spectral-consistency", reduction="none")
    targets = torch.from_numpy(cube.bands)
    own, first = loss(sharp, targets), loss(torch.from_numpy(cube.smooth), targets)
    return torch.where(first > 0, own / torch.where(first > 0, first, 1), 1.0)
