"""Zero-shot pansharpening: a network is tuned on the one image that it sharpens."""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.data.batch import Batch
from lossworks.data.cubes.scenes import Cube, load_cube, read_cube
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.metrics.cubes import of_bands
from lossworks.models import HeadedModel, Outputs
from lossworks.models.folders import CONFIG, fill_model, read_config, write_model
from lossworks.models.operations import count_step_flops
from lossworks.models.segmentation.pansharpener import Pansharpener, build_pansharpener
from lossworks.specs import LossSpec, RunSpec
from lossworks.specs.tasks.pansharpening import CubeSpec, PansharpenerSpec
from lossworks.tasks.examples import require_whole_head
from lossworks.tasks.interface import Mode, Predictions, Simplest, Task, as_sums

_FORMAT = "lossworks-pansharpener"


class PansharpeningSpec(RunSpec):
    """Tuning of a network on one cube."""

    task: Literal["pansharpening"] = Field("pansharpening", description="what is trained")
    data: CubeSpec = CubeSpec()
    model: PansharpenerSpec = PansharpenerSpec()
    loss: LossSpec = LossSpec(name="spectral-consistency", plus=(LossSpec(name="pan-correlation"),))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_head(self)
        PansharpeningTask.require_entries(self)
        return self


class PansharpeningTask(Task):
    """One cube, whose bands are the rows; it is trained on and measured, since there is no other.

    Args:
        spec: The run.
        learnt: Nothing.

    Raises:
        UserError: The cube can't be read.
    """

    slug = "pansharpening"
    title = "bands of one image, sharpened by a panchromatic one"
    unit = "bands"
    spec: ClassVar[type[RunSpec]] = PansharpeningSpec
    kinds = ("band",)
    provides = ("inputs", "targets", "pan", "sharp")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/spectral": "min",
        "eval/spatial": "min",
        "eval/ergas": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("spectral error over interpolation's", "eval/spectral", "{:.4f} x"),
        ("spatial error, 1 − |ρ|", "eval/spatial", "{:.4f}"),
        ("ERGAS", "eval/ergas", "{:.4f}"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Errors of all bands",
        {"eval/spectral": "spectral, over interpolation's", "eval/spatial": "spatial, 1 − |ρ|"},
    )

    def __init__(self, spec: PansharpeningSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec, learnt)
        self.run = spec
        self.cube: Cube = load_cube(spec.data, spec.seed)
        self.train = self.held_out = self.cube
        self._spectral, self._spatial = (create(name, reduction="none") for name in _MEASURES)

    @property
    def data_bytes(self) -> int:
        """See :attr:`Task.data_bytes`."""
        return self.cube.nbytes

    def build_model(self, model: Mapping[str, Any] | None = None) -> Pansharpener:
        """See :meth:`Task.build_model`."""
        spec = self.run.model if model is None else PansharpenerSpec.parse(model, source="model")
        return build_pansharpener(spec, seed=self.run.seed)

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many bands count, and nothing further."""
        return float((~batch["targets"].isnan().flatten(1).any(1)).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return counts and sums of spectral, spatial and relative squared errors, float64 (5,)."""
        del own
        sharp, targets, truth = outputs.logits[..., 0], batch["targets"], batch["sharp"]
        known = ~targets.isnan().flatten(1).any(1)
        spectral = self._spectral(sharp, targets).double()
        smooth = self._spectral(batch["inputs"][:, 0], targets).double()
        spatial = self._spatial(sharp, targets, pan=batch["pan"]).double()
        seen = known & ~truth.isnan().flatten(1).any(1)
        errors = (sharp - truth).double().square().flatten(1).mean(1)
        means = truth.double().flatten(1).mean(1).square()
        seen = seen & (means > 0)
        relative = torch.where(seen, errors, 0) / torch.where(seen, means, 1)
        ratios = torch.where(known & (smooth > 0), spectral / smooth.where(smooth > 0, 1), 0)
        parts = (known, ratios, spatial * known, relative, seen)
        return as_sums(*(part.double().sum() for part in parts), like=sharp)

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks; ERGAS only where the sharp bands are known."""
        bands, spectral, spatial, relative, seen = sums.tolist()
        found = {"eval/spectral": spectral / max(bands, 1), "eval/spatial": spatial / max(bands, 1)}
        if seen:
            found["eval/ergas"] = of_bands(torch.tensor([relative / seen]), self.cube.ratio)
        return found, {}

    def simplest(self) -> Simplest:
        """Return what cubic interpolation gets, which looks at no panchromatic image."""
        rows = self.cube.batch(np.arange(len(self.cube)))
        smooth = rows["inputs"][:, :1].movedim(1, -1)
        outputs = Outputs(smooth, None, dense=smooth)
        return Simplest("cubic interpolation", self.figures(self.measure(outputs, rows, torch.zeros(1)))[0])

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations a band, counted on one of them."""
        return count_step_flops(model, self.cube.batch(np.zeros(1, dtype=np.int64))["inputs"])

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return the sharpened bands of a cube as an npz file; see :meth:`Task.predict`."""
        config = read_config(folder / CONFIG)
        if config.get("format") != _FORMAT:
            raise UserError(f"{folder}: is no exported pansharpener")
        model = build_pansharpener(PansharpenerSpec.parse(config["model"], source=str(folder)), seed=0)
        fill_model(model, folder)
        cube = read_cube(file)
        with torch.no_grad():
            inputs = cube.batch(np.arange(len(cube)))["inputs"]
            sharp = torch.cat([model.hidden(band)[..., 0] for band in inputs.split(1)]) * cube.scale
        columns = {"band": list(range(len(cube))), "mean": sharp.flatten(1).mean(1).tolist()}
        return Predictions(columns, files={"sharp.npz": partial(_as_npz, sharp.numpy())})

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights and configuration; see :meth:`Task.save`."""
        del learnt
        own = cast("PansharpeningSpec", spec).model
        config = {
            "format": _FORMAT,
            "format_version": 1,
            "model": own.model_dump(mode="json"),
            "provenance": dict(provenance),
        }
        write_model(to, config, build_pansharpener(own, seed=0), state)


_MEASURES = ("spectral-consistency", "pan-correlation")


def _as_npz(sharp: np.ndarray) -> bytes:
    """Return sharpened bands (C, H, W) as the content of an npz file."""
    file = BytesIO()
    np.savez_compressed(file, sharp=sharp)
    return file.getvalue()
