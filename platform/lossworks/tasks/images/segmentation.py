"""Training of segmenters: a class for each pixel of an image."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import declaration, declarations
from lossworks.data import Order, VisitOrder
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.data.images.masked_images import read_input
from lossworks.data.images.masks import load_masks
from lossworks.data.images.picture_files import PICTURES
from lossworks.data.learnt import Learnt
from lossworks.data.order import spaced
from lossworks.data.standardise import Standardisation
from lossworks.errors import UserError
from lossworks.metrics import ClassSums, class_sums
from lossworks.metrics.segmentation import MapSums, map_sums
from lossworks.models import HeadedModel, Outputs
from lossworks.models.operations import count_step_flops
from lossworks.models.segmentation import Segmenter, build_segmenter, load_segmenter, save_segmenter
from lossworks.specs import AnalysisSpec, LossSpec, MasksSpec, RunSpec, SegmenterSpec
from lossworks.tasks.examples import require_whole_head
from lossworks.tasks.interface import Mode, Predictions, Prepared, Say, Simplest, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKED_AT = 256  # images, for what the simplest answer gets


class SegmentationSpec(RunSpec):
    """Training of a segmenter."""

    task: Literal["segmentation"] = Field("segmentation", description="what is trained")
    data: MasksSpec = MasksSpec()
    model: SegmenterSpec = SegmenterSpec()
    loss: LossSpec = LossSpec(name="ce-dice")
    analyses: tuple[AnalysisSpec, ...] = Field(
        (AnalysisSpec(name="map-cases"),),
        description="what is measured with each evaluation; `lossworks analyses` lists them",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        require_whole_head(self)
        if self.optimizer.kind == "muon":
            raise ValueError(
                "optimizer.kind=muon moves matrices, and these models are made of convolutions: use "
                "optimizer.kind=adamw"
            )
        SegmentationTask.require_entries(self)
        return self


class SegmentationTask(Task):
    """Images with a class for each pixel, measured by overlap, borders and connectedness.

    Args:
        spec: The run.
        learnt: What the model has learnt from data before.

    Raises:
        UserError: The images can't be read, or are of more than two classes where the loss is for two.
    """

    slug = "segmentation"
    title = "a class for each pixel of an image"
    unit = "images"
    spec: ClassVar[type[RunSpec]] = SegmentationSpec
    kinds = ("row", "logits", "margin", "map")
    provides = ("inputs", "targets", "priors")
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/dice": "max",
        "eval/iou": "max",
        "eval/boundary_f": "max",
        "eval/b0_error": "min",
        "eval/b1_error": "min",
        "eval/cross_entropy": "min",
        "eval/ece": "min",
    }
    shown: ClassVar[Sequence[tuple[str, str, str]]] = (
        ("held-out Dice", "eval/dice", "{:.4f}"),
        ("held-out IoU", "eval/iou", "{:.4f}"),
        ("boundary F", "eval/boundary_f", "{:.4f}"),
        ("error of components (b0)", "eval/b0_error", "{:.3f} an image"),
        ("error of holes (b1)", "eval/b1_error", "{:.3f} an image"),
        ("cross-entropy of pixels", "eval/cross_entropy", "{:.4f} nats"),
        ("calibration error of pixels", "eval/ece", "{:.4f}"),
    )
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = (
        "Held-out overlap and borders",
        {"eval/dice": "Dice", "eval/boundary_f": "boundary F"},
    )

    def __init__(self, spec: SegmentationSpec, learnt: Learnt | None = None) -> None:
        super().__init__(spec)
        self.run = spec
        self.data = load_masks(spec.data, spec.seed, learnt)
        self.train, self.held_out = self.data.train, self.data.held_out
        if spec.data.unlabelled:
            _require_label_free(spec)
        for term in spec.loss.terms:
            if declaration(term.name).kind == "margin" and len(self.data.names) != 2:
                raise UserError(
                    f"loss.name={term.name} is for two classes, and there are {', '.join(self.data.names)}: "
                    "set data.foreground=true, or data.classes=[A, B]"
                )

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """See :meth:`Task.prepare`."""
        found = super().prepare(spec, say, learnt)
        classes = found.learnt.fact("classes") if found.learnt is not None else ()
        return replace(found, guess=math.log(len(classes)))

    @classmethod
    def condition(cls, entry: Declaration) -> str:
        """See :meth:`Task.condition`."""
        if entry.kind == "margin":
            return f"{entry.slug} is for two classes: set data.foreground=true, or data.classes=[A, B]"
        return ""

    @property
    def learnt(self) -> Learnt:
        """See :attr:`Task.learnt`."""
        return self.data.learnt

    @property
    def data_bytes(self) -> int:
        """See :attr:`Task.data_bytes`."""
        return self.data.train.nbytes + self.data.held_out.nbytes

    def order(self) -> Order:
        """Return an order of visits, each of which draws a patch and its changes anew."""
        return VisitOrder(len(self.train), self.run.batch_size, self.run.seed)

    def row_classes(self) -> np.ndarray:
        """See :meth:`Task.row_classes`: the commonest class of an image but the first, the background."""
        found = [np.bincount(mask[mask > 0], minlength=2) for mask in self.data.train.masks]
        return np.array([counts.argmax() for counts in found], dtype=np.int64)

    def build_model(self, model: Mapping[str, Any] | None = None) -> Segmenter:
        """See :meth:`Task.build_model`."""
        spec = self.run.model if model is None else SegmenterSpec.parse(model, source="model")
        return build_segmenter(
            spec, channels=self.data.channels, classes=len(self.data.names), seed=self.run.seed
        )

    @classmethod
    def element_of(cls, spec: RunSpec) -> str:
        """See :meth:`Task.element_of`: images, of losses of maps alone, and else pixels."""
        kinds = {declaration(term.name).kind for term in spec.loss.terms}
        return "image" if kinds == {"map"} else "pixel"

    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many images have a pixel that counts, and nothing further."""
        return float((batch["targets"] != IGNORE_INDEX).flatten(1).any(1).sum()), 0.0

    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return the sums of the yardsticks."""
        del own
        return _sums(outputs.logits, batch["targets"])

    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the yardsticks, and the overlap of every class; none of what needs masks without any."""
        if not self.run.data.labelled:
            return {}, {}
        size = _of_maps(len(self.data.names))
        pixels, maps = sums[:-size], MapSums(sums[-size:])
        found = ClassSums(pixels).metrics()
        figures = {**maps.metrics(), **{name: found[name] for name in ("cross_entropy", "ece", "accuracy")}}
        every = maps.by_class()
        by_class = {name: every[name] for name in ("dice", "iou")}
        return {f"eval/{name}": value for name, value in figures.items()}, {
            "classes": [*self.data.names],
            **{name: [None if math.isnan(v) else v for v in values] for name, values in by_class.items()},
        }

    def simplest(self) -> Simplest | None:
        """Return what the commonest class of the training pixels gets, said of every pixel."""
        if not self.run.data.labelled:
            return None
        counts = torch.from_numpy(self.data.train.pixels_of_classes(len(self.data.names)))
        log_p = ((counts + 1.0) / (counts.sum() + len(counts))).log()
        sums = []
        for row in spaced(_LOOKED_AT, len(self.held_out)):
            targets = self.held_out.batch(np.array([row]))["targets"]
            sums.append(_sums(log_p.expand(*targets.shape, -1), targets))
        name = self.data.names[int(counts.argmax())]
        return Simplest(f"{name} everywhere", self.figures(torch.stack(sums).sum(0))[0])

    def flops_per_unit(self, model: HeadedModel) -> float:
        """Return the operations an image, counted on one of them."""
        return count_step_flops(model, self.train.batch(np.zeros(1, dtype=np.int64))["inputs"])

    def class_names(self) -> tuple[str, ...]:
        """See :meth:`Task.class_names`."""
        return self.data.names

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return a mask for each image, and the share of pixels of each class; see :meth:`Task.predict`.

        A mask is a PNG of classes by number, named like its image.
        """
        found = load_segmenter(folder)
        masks = {}
        for path in _pictures(file):
            image = read_input(path, found.channels, None, "the model's")
            masks[path.name] = found.masks(image[None])[0].astype(np.uint16)
        columns: dict[str, Sequence[Any]] = {"image": list(masks)}
        for number, name in enumerate(found.names):
            columns[f"share of {name}"] = [float((mask == number).mean()) for mask in masks.values()]
        files = {f"masks/{Path(name).stem}.png": partial(_as_png, mask) for name, mask in masks.items()}
        return Predictions(columns, files=files)

    @classmethod
    def draw(cls, axes: "Axes", pictured: Mapping[str, Any]) -> bool:
        """Draw the overlap of each class; see :meth:`Task.draw`."""
        from lossworks.reporting.picture_style import BLUE, ORANGE, not_measured

        axes.set_title("Overlap of each class at the last evaluation")
        if not pictured.get("classes"):
            not_measured(axes)
            return True
        places = np.arange(len(pictured["classes"]))
        for name, label, shift, colour in (("dice", "Dice", -0.2, BLUE), ("iou", "IoU", 0.2, ORANGE)):
            values = [value or 0.0 for value in pictured[name]]
            bars = axes.bar(places + shift, values, 0.38, color=colour, label=label)
            axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.set(ylabel="share", ylim=(0, 1.45), xticks=places)
        axes.set_xticklabels(pictured["classes"])
        axes.grid(visible=False, axis="x")
        axes.legend(loc="upper right", ncols=2)
        return True

    @classmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write weights, configuration, class names and scale of the channels; see :meth:`Task.save`."""
        save_segmenter(
            to,
            spec=cast("SegmentationSpec", spec).model,
            state=state,
            channels=int(learnt.fact("channels")),
            names=tuple(learnt.fact("classes")),
            standardisation=Standardisation.of_facts(learnt.facts),
            provenance=provenance,
        )


def _require_label_free(spec: SegmentationSpec) -> None:
    """Refuse to train on masks that aren't there.

    Raises:
        UserError: Naming the losses that read none.
    """
    for term in spec.loss.terms:
        if "label-free" not in declaration(term.name).flags:
            able = ", ".join(
                slug for slug, entry in declarations("losses").items() if "label-free" in entry.flags
            )
            raise UserError(
                f"data.unlabelled=true: loss.name={term.name} reads masks; what reads none: {able}"
            )


def _of_maps(classes: int) -> int:
    """Return how many numbers the sums of maps of K classes are."""
    return 6 + 7 * classes


def _sums(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the sums of pixels, and behind them those of maps, of logits (B, H, W, K), float64 (S,)."""
    classes = logits.shape[-1]
    pixels = class_sums(logits.reshape(-1, classes), targets.reshape(-1), IGNORE_INDEX).values
    maps = map_sums(logits.argmax(-1), targets, classes).values
    return torch.cat((pixels, maps.to(pixels)))


def _pictures(file: Path) -> list[Path]:
    """Return the picture that a path names, or those in a folder, in its folder ``images`` if it has one.

    Raises:
        UserError: There are none.
    """
    if file.is_file():
        return [file]
    if not file.is_dir():
        raise UserError(f"{file}: no such file or folder")
    folder = file / "images" if (file / "images").is_dir() else file
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise UserError(f"{folder}: holds no pictures; they end in {', '.join(PICTURES)}")
    return found


def _as_png(mask: np.ndarray) -> bytes:
    """Return a mask (H, W) as the content of a PNG file, in 8 bits where there are at most 256 classes."""
    from PIL import Image

    file = BytesIO()
    Image.fromarray(mask.astype(np.uint8) if mask.max(initial=0) < 256 else mask).save(file, "PNG")
    return file.getvalue()
