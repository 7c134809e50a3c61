"""What methods share that calibrate a classifier after its training: data, temperatures, figures."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.data.batch import Batch
from lossworks.metrics import auroc
from lossworks.models import Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import ExampleRows, Mode, Task
from lossworks.tasks.methods import Method, Trained

View = Callable[[Tensor], Tensor]
"""A transformed copy of inputs, shaped like them."""

_BINS = 15


class Calibration(Method):
    """A temperature for every row of logits, fitted after training on data that the model has not fitted.

    Every second held-out example calibrates, and the others measure: calibration error (15 bins), Brier score
    of the answer, and AUROC of the answer's confidence, each before and after.
    """

    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "calibration/ece": "min",
        "calibration/top1_brier": "min",
        "calibration/auroc": "max",
    }
    sees_views: ClassVar[bool] = False

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but classifiers.

        Raises:
            UserError: Naming the task.
        """
        del spec
        task.require_classifier(f"methods: {self.slug} calibrates")

    @abstractmethod
    def calibrate(self, logits: Tensor, views: Tensor, labels: Tensor, *, seed: int) -> None:
        """Fit on calibration data.

        Args:
            logits: Of the originals, shape (N, K).
            views: Logits of n transformed copies, shape (n, N, K); n = 0 unless ``sees_views``.
            labels: Shape (N,), int64.
            seed: Of whatever is drawn.
        """

    @abstractmethod
    def temperatures(self, logits: Tensor, views: Tensor) -> Tensor:
        """Return the temperatures (N,) of rows, after :meth:`calibrate`; shapes as there."""

    def finish(self, trained: Trained) -> Finding:
        """See :meth:`Method.finish`."""
        data, seed = trained.task.held_out, trained.task.spec_of_run.seed
        rows = np.arange(len(data))
        parts = np.array_split(rows, len(rows) // 256 + 1)
        labels = torch.cat([data.batch(part)["targets"] for part in parts])
        logits = trained.collect(_logits, data, rows).float()
        seen = [
            trained.collect(_logits, Viewed(data, view), rows).float() for view in self._views(data, seed)
        ]
        views = torch.stack(seen) if seen else logits.new_zeros(0, *logits.shape)
        own, other = slice(0, None, 2), slice(1, None, 2)
        self.calibrate(logits[own], views[:, own], labels[own], seed=seed)
        z, y = logits[other], labels[other]
        before = calibration_figures(z, torch.ones(len(z)), y)
        after = calibration_figures(z, self.temperatures(z, views[:, other]), y)
        found = {f"calibration/{name}": value for name, value in after.items()}
        return Finding(found | {f"calibration/{name}_before": value for name, value in before.items()})

    def _views(self, data: ExampleRows, seed: int) -> Sequence[View]:
        if not self.sees_views:
            return ()
        shape = data.batch(np.arange(1))["inputs"].shape[1:]
        return image_views(seed) if len(shape) == 3 else signal_views(seed)


class Viewed:
    """Examples seen through a transformation.

    Args:
        data: The examples.
        view: What is done to their inputs.
    """

    def __init__(self, data: ExampleRows, view: View) -> None:
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


def confidence(logits: Tensor, temperature: Tensor) -> Tensor:
    """Return max_k softmax(z/T)_k, shape (N,), of logits (N, K) at temperatures (N,) or one."""
    scaled = logits / temperature.reshape(-1, 1)
    return (scaled.amax(1) - scaled.logsumexp(1)).exp()


def calibration_figures(logits: Tensor, temperature: Tensor, labels: Tensor) -> dict[str, float]:
    """Return calibration error, Brier score and AUROC of the answers' confidence.

    Args:
        logits: Shape (N, K).
        temperature: T > 0, shape (N,).
        labels: Shape (N,), int64.
    """
    sure, right = confidence(logits, temperature), logits.argmax(1) == labels
    place = (sure * _BINS).ceil().long().clamp(1, _BINS) - 1
    gaps = torch.zeros(_BINS).index_add(0, place, sure.float() - right.float())
    return {
        "ece": float(gaps.abs().sum() / len(sure)),
        "top1_brier": float((sure - right.float()).square().mean()),
        "auroc": auroc(sure, right),
    }


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
