"""One temperature for all logits, fitted after training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.catalogue.declaration import Paper
from lossworks.tasks.calibration import Calibration

_LEAST, _MOST = -2.0, 2.0  # decimal logarithms of the temperatures that are tried


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the one temperature of least cross-entropy, from 0.01 to 100.

    Args:
        logits: Shape (N, K).
        labels: Shape (N,), int64.
    """
    from scipy.optimize import minimize_scalar

    z = logits.detach().double()

    def objective(log_temperature: float) -> float:
        return float(F.cross_entropy(z / 10**log_temperature, labels))

    return float(10 ** minimize_scalar(objective, bounds=(_LEAST, _MOST), method="bounded").x)


class TemperatureScaling(Calibration):
    """Temperature scaling: all logits over one number, after training.

    The answers stay what they are, and so does their order by confidence, but for ties.
    """

    slug = "temperature-scaling"
    formula = "softmax(z/T) with the T of least cross-entropy on data that the model has not fitted"
    paper = Paper(
        "On Calibration of Modern Neural Networks", "Guo, Pleiss, Sun, Weinberger", 2017, "section 4.2"
    )
    example = "lossworks train jobs/specs/digits.yaml methods=[{slug}]"

    _temperature = 1.0

    def calibrate(self, logits: Tensor, views: Tensor, labels: Tensor, *, seed: int) -> None:
        """See :meth:`Calibration.calibrate`."""
        del views, seed
        self._temperature = fit_temperature(logits, labels)

    def temperatures(self, logits: Tensor, views: Tensor) -> Tensor:
        """See :meth:`Calibration.temperatures`."""
        del views
        return torch.full((len(logits),), self._temperature)

    def result(self) -> dict[str, Tensor]:
        """Return the temperature."""
        return {"temperature": torch.tensor(self._temperature, dtype=torch.float64)}
