"""A calibrator that gives every sample a temperature of its own, trained on whether the model was right."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, integer, number, switch
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.losses.rows import wide
from lossworks.metrics import auroc
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Rows, Task
from lossworks.tasks.methods import Method, Trained

View = Callable[[Tensor], Tensor]
"""A transformed copy of inputs, shaped like them."""

_FIRST_TEMPERATURE = 1.25  # the clip at the least temperature has no gradient, so training starts above it


def confidence(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return max_k softmax(z/T)_k, shape (N,), of logits (N, K) at temperatures (N,) or one."""
    scaled = logits / temperature.reshape(-1, 1)
    return (scaled.amax(1) - scaled.logsumexp(1)).exp()


def correctness_loss(logits: Tensor, temperature: Tensor, labels: Tensor, *, balance: bool = False) -> Tensor:
    """Return the squared differences of confidence and correctness, the top-1 Brier scores, shape (N,).

    Args:
        logits: z, shape (N, K).
        temperature: T > 0, shape (N,).
        labels: Shape (N,), int64.
        balance: Weigh right rows by 1 − a and wrong ones by a, with the accuracy a, of mean weight 1, as the
            authors' code does. It separates better and calibrates worse: where the chance η of being right is
            a, the best confidence is one half.
    """
    right = (logits.argmax(1) == labels).to(logits.dtype)
    losses = (confidence(logits, temperature) - right).square()
    if not balance:
        return losses
    accuracy = right.mean()
    weight = torch.where(right > 0, 1 - accuracy, accuracy)
    return losses * weight / weight.mean().clamp_min(torch.finfo(weight.dtype).tiny)


class Calibrator(nn.Module):
    """Temperatures from how the softmax of transformed copies behaves at the original's top classes.

    Args:
        views: Number of copies, n.
        k: Top classes looked at.
        hidden: Features of the hidden layer.
        bounds: Least and largest temperature.
    """

    def __init__(self, views: int, k: int, hidden: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.k, self.bounds = k, bounds
        last = nn.Linear(hidden, 1)
        nn.init.constant_(last.bias, _FIRST_TEMPERATURE)
        self.layers = nn.Sequential(nn.Linear(views * k, hidden), nn.ReLU(), last)

    def features(self, logits: Tensor, views: Tensor) -> Tensor:
        """Return the views' probabilities of the original's k likeliest classes, shape (N, n·k).

        Args:
            logits: Of the originals, shape (N, K).
            views: Logits of the copies, shape (n, N, K).
        """
        top = logits.topk(self.k, dim=1).indices
        seen = [view.softmax(1).gather(1, top) for view in views]
        return torch.cat(seen, dim=1)

    def forward(self, logits: Tensor, views: Tensor) -> Tensor:
        """Return a temperature for every row, shape (N,); float32 at least."""
        logits, views = wide(logits), wide(views)
        return self.layers(self.features(logits, views)).squeeze(1).clamp(*self.bounds)

    @torch.no_grad()
    def probabilities(self, logits: Tensor, views: Tensor) -> Tensor:
        """Return the calibrated softmax, shape (N, K); the likeliest class stays the likeliest."""
        return (wide(logits) / self(logits, views)[:, None]).softmax(1)


class CorrectnessAware(Method):
    """Correctness-aware calibration: a temperature for each sample, after training.

    Cross-entropy makes a narrow miss more confident, since its label is above the average logit; this loss
    raises the temperature of every wrong row and lowers that of every right one. Calibrate on data that the
    model has not fitted: in a training every second held-out example calibrates, after the last step, and the
    others measure what it brings, beside one temperature for all.
    """

    slug = "correctness-aware"
    formula = "mean (max_k softmax(z_i/T_i)_k - [argmax z_i = y_i])² with T_i = clip(g(views of x_i))"
    paper = Paper(
        "Optimizing Calibration by Gaining Aware of Prediction Correctness", "Liu et al.", 2024, "equation 4"
    )

    k: int = integer(4, "top classes of the original that are looked at in every view", ge=1, search=(1, 10))
    hidden: int = integer(5, "features of the calibrator's hidden layer", ge=1, le=4096)
    lowest: float = number(0.1, "least temperature", gt=0)
    highest: float = number(10.0, "largest temperature", gt=0)
    lr: float = number(1e-4, "learning rate of Adam", gt=0, search=(1e-4, 1e-2), log=True)
    epochs: int = integer(10, "passes over the calibration data", ge=1, search=(10, 500), log=True)
    batch_size: int = integer(1000, "rows a step", ge=1)
    balance: bool = switch(
        False, "weigh right and wrong rows alike, as the authors' code does; else the mean"
    )

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but classifiers.

        Raises:
            UserError: Naming the task.
        """
        del spec
        if "eval/accuracy" not in task.yardsticks:
            raise UserError(f"methods: {self.slug} calibrates classifiers, not task={task.slug}")

    def finish(self, trained: Trained) -> Finding:
        """Fit the calibrator on half the held-out examples and measure it on the others."""
        data, seed = trained.task.held_out, trained.task.spec_of_run.seed
        rows = np.arange(len(data))
        shape = data.batch(rows[:1])["inputs"].shape[1:]
        views = image_views(seed) if len(shape) == 3 else signal_views(seed)
        labels = torch.cat(
            [data.batch(part)["targets"] for part in np.array_split(rows, len(rows) // 256 + 1)]
        )
        logits = trained.collect(_logits, data, rows).float()
        seen = torch.stack([trained.collect(_logits, _Viewed(data, view), rows) for view in views]).float()
        own = slice(0, None, 2)
        self._calibrator = self.fit(logits[own], seen[:, own], labels[own], seed=seed)
        one = fit_temperature(logits[own], labels[own])
        z, y, test = logits[1::2], labels[1::2], seen[:, 1::2]
        temperatures = {
            "": torch.ones(len(z)),
            "temperature_scaling_": torch.full((len(z),), one),
            "calibrated_": self._calibrator(z, test).detach(),
        }
        figures: dict[str, float] = {}
        for name, temperature in temperatures.items():
            found = _judged(z, temperature, y)
            figures |= {f"calibration/{name}{figure}": value for figure, value in found.items()}
        return Finding(figures)

    def result(self) -> dict[str, Tensor]:
        """Return the calibrator's parameters."""
        return {} if self._calibrator is None else dict(self._calibrator.state_dict())

    _calibrator: Calibrator | None = None

    def fit(self, logits: Tensor, views: Tensor, labels: Tensor, *, seed: int = 0) -> Calibrator:
        """Return a calibrator trained on calibration data.

        Args:
            logits: Of the originals, shape (N, K).
            views: Logits of n transformed copies, shape (n, N, K).
            labels: Shape (N,), int64.
            seed: Of the calibrator's parameters and the order of rows.

        Raises:
            UserError: The shapes don't fit, there is no row or no view, or the temperatures' bounds are the
                wrong way round.
        """
        self._check(logits, views, labels)
        logits, views = wide(logits.detach()), wide(views.detach())
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            k = min(self.k, logits.shape[1])
            calibrator = Calibrator(len(views), k, self.hidden, (self.lowest, self.highest))
        calibrator.to(logits)
        optimizer = torch.optim.Adam(calibrator.parameters(), self.lr)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(self.batch_size):
                temperature = calibrator(logits[rows], views[:, rows])
                loss = correctness_loss(logits[rows], temperature, labels[rows], balance=self.balance).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return calibrator

    def _check(self, logits: Tensor, views: Tensor, labels: Tensor) -> None:
        if views.dim() != 3 or views.shape[1:] != logits.shape or labels.shape != logits.shape[:1]:
            raise UserError(
                f"{self.slug}: logits {tuple(logits.shape)}, views {tuple(views.shape)} and labels "
                f"{tuple(labels.shape)} must be (N, K), (n, N, K) and (N,)"
            )
        if not views.numel():
            raise UserError(f"{self.slug}: there is nothing to fit: views {tuple(views.shape)} are empty")
        if self.lowest >= self.highest:
            raise UserError(f"{self.slug}: lowest={self.lowest:g} must be below highest={self.highest:g}")


class _Viewed:
    """Examples seen through a transformation.

    Args:
        data: The examples.
        view: What is done to their inputs.
    """

    def __init__(self, data: Rows, view: View) -> None:
        self._data, self._view = data, view

    def __len__(self) -> int:
        return len(self._data)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of rows (B,), with transformed inputs."""
        batch = self._data.batch(rows)
        return {**batch, "inputs": self._view(batch["inputs"])}


def _logits(outputs: Outputs, batch: Batch) -> Tensor:
    del batch
    return outputs.logits


def _judged(logits: Tensor, temperature: Tensor, labels: Tensor) -> dict[str, float]:
    """Return calibration error (15 bins), Brier score and AUROC of the answers' confidence."""
    sure, right = confidence(logits, temperature), logits.argmax(1) == labels
    place = (sure * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15).index_add(0, place, sure.float() - right.float())
    return {
        "ece": float(gaps.abs().sum() / len(sure)),
        "top1_brier": float((sure - right.float()).square().mean()),
        "auroc": auroc(sure, right),
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the one temperature of least cross-entropy, from 0.01 to 100: temperature scaling, the baseline.

    Guo et al., *On Calibration of Modern Neural Networks*, 2017, section 4.2.

    Args:
        logits: Shape (N, K).
        labels: Shape (N,), int64.
    """
    from scipy.optimize import minimize_scalar

    z = logits.detach().double()

    def objective(log_temperature: float) -> float:
        return float(F.cross_entropy(z / 10**log_temperature, labels))

    return float(10 ** minimize_scalar(objective, bounds=(-2.0, 2.0), method="bounded").x)


def signal_views(seed: int) -> Sequence[View]:
    """Return three views of signals (N, C, L) or vectors (N, F): shifted, with noise, and scaled."""
    return (
        lambda x: x.roll(max(1, x.shape[-1] // 10), -1),
        lambda x: x + 0.3 * x.std() * torch.randn(x.shape, generator=_generator(seed)).to(x),
        lambda x: 0.7 * x,
    )


def image_views(seed: int) -> Sequence[View]:
    """Return three views of images (N, C, H, W): turned by 15 degrees, without colour, with other colours."""
    return (
        _turned,
        lambda x: x.mean(1, keepdim=True).expand_as(x),
        lambda x: x * (1 + 0.3 * torch.randn(1, x.shape[1], 1, 1, generator=_generator(seed)).to(x)),
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _turned(x: Tensor, degrees: float = 15.0) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    sine, cosine, zero = angle.sin(), angle.cos(), torch.zeros(())
    turn = torch.stack((torch.stack((cosine, -sine, zero)), torch.stack((sine, cosine, zero)))).to(x)
    grid = F.affine_grid(turn.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
