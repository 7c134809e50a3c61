"""A calibrator that gives every sample a temperature of its own, trained on whether the model was right."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, choice, integer, number, switch
from lossworks.errors import UserError
from lossworks.losses.rows import wide
from lossworks.tasks.calibration import Calibration, confidence

_FIRST_TEMPERATURE = 1.25  # the clip at the least temperature has no gradient, so training starts above it


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
        found: Tensor = self.layers(self.features(logits, views)).squeeze(1).clamp(*self.bounds)
        return found

    @torch.no_grad()
    def probabilities(self, logits: Tensor, views: Tensor) -> Tensor:
        """Return the calibrated softmax, shape (N, K); the likeliest class stays the likeliest."""
        found: Tensor = (wide(logits) / self(logits, views)[:, None]).softmax(1)
        return found


class CorrectnessAware(Calibration):
    """Correctness-aware calibration: a temperature for each sample, after training.

    Cross-entropy makes a narrow miss more confident, since its label is above the average logit; this loss
    raises the temperature of every wrong row and lowers that of every right one. In a training every second
    held-out example calibrates, after the last step, and the others measure what it brings.
    """

    slug = "correctness-aware"
    example = "lossworks train jobs/specs/digits.yaml methods=[{slug}]"
    sees_views = True
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
    objective: str = choice(
        "correctness",
        "what the network is trained on: correctness, or cross-entropy, with which it is compared",
        ("correctness", "cross-entropy"),
    )
    balance: bool = switch(
        False, "weigh right and wrong rows alike, as the authors' code does; else the mean"
    )

    _calibrator: Calibrator | None = None

    def calibrate(self, logits: Tensor, views: Tensor, labels: Tensor, *, seed: int) -> None:
        """See :meth:`Calibration.calibrate`."""
        self._calibrator = self.fit(logits, views, labels, seed=seed)

    @torch.no_grad()
    def temperatures(self, logits: Tensor, views: Tensor) -> Tensor:
        """See :meth:`Calibration.temperatures`."""
        if self._calibrator is None:
            raise ValueError("nothing has been calibrated yet")
        found: Tensor = self._calibrator(logits, views)
        return found

    def result(self) -> dict[str, Tensor]:
        """Return the calibrator's parameters."""
        return {} if self._calibrator is None else dict(self._calibrator.state_dict())

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
                loss = self._loss(logits[rows], temperature, labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return calibrator

    def _loss(self, logits: Tensor, temperature: Tensor, labels: Tensor) -> Tensor:
        if self.objective == "cross-entropy":
            return F.cross_entropy(logits / temperature[:, None], labels)
        return correctness_loss(logits, temperature, labels, balance=self.balance).mean()

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
