"""The worst, the median and the best held-out image of a segmenter, with its mistakes marked.

Shapes: B images of C channels and sides H, W.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.models import Outputs
from lossworks.specs import MasksSpec, RunSpec
from lossworks.tasks.analyses import Analysis, Curve, Finding, NumberedRows, Probe
from lossworks.tasks.interface import Mode, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Ring = tuple[float, float, float]
"""x, y and radius of a mark, in pixels."""

_CASES = ("worst", "median", "best")
_RIGHT, _MISSED, _SPURIOUS = "#d7dbe0", "#d9541e", "#2563a8"
_DISPLAYED = 256  # pixels of a side in the picture, at most
_CURVES = {"loss": "held-out loss", "dice": "Dice", "boundary_f": "boundary F"}


class MapCases(Analysis):
    """The worst, the median and the best held-out image by Dice: image, mask, prediction and errors.

    In the errors an orange ring marks a place where the prediction breaks a component of the mask, or misses
    it wholly, a blue ring a component that the mask doesn't have. A component is a set of pixels of one class
    other than the first, the background, that are connected by sides or corners.
    """

    slug = "map-cases"
    formula = "Dice of each image: 2 Σ p y / Σ (p + y) over the classes but the first"
    paper = Paper(
        "TopoMortar: A Dataset to Evaluate Image Segmentation Methods Focused on Topology Accuracy",
        "Valverde, Koga, Otsuka, Dahl",
        2025,
        "the pictures of errors",
    )
    example = "lossworks train jobs/specs/walls.yaml"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/worst_dice": "max"}

    marks: int = integer(
        12, "rings in a picture of errors at most, the largest components first", ge=0, le=200
    )

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Analysis.check`."""
        super().check(task, spec)
        if "map" not in task.kinds:
            raise UserError(f"analyses: {self.slug} looks at maps of classes, not at task={task.slug}")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`."""
        if not cast("MasksSpec", probe.task.spec_of_run.data).labelled:  # type: ignore[attr-defined]
            return Finding({}, notes=["there are no masks to compare with"])
        rows = probe.held_out
        numbered = NumberedRows(probe.task.held_out)
        found = probe.over(_Dice(len(probe.task.held_out)), numbered, rows)
        dice, counted = found.reshape(2, -1)[:, rows].numpy()
        known = rows[counted > 0]
        if not len(known):
            return Finding({"worst_dice": 0.0}, notes=["no held-out image has a pixel that counts"])
        order = known[np.argsort(dice[counted > 0], kind="stable")]
        chosen = dict(zip(_CASES, order[[0, len(order) // 2, -1]].tolist(), strict=True))
        by_row = dict(zip(rows.tolist(), dice.tolist(), strict=True))
        cases = [
            {"title": f"{title}: image {row}, Dice {by_row[row]:.3f}", **self._case(probe, row)}
            for title, row in chosen.items()
        ]
        figures = {f"{title}_dice": by_row[row] for title, row in chosen.items()}
        return Finding(figures, {"cases": cases, "classes": list(probe.task.class_names())})

    def _case(self, probe: Probe, row: int) -> dict[str, Any]:
        """Return image, mask, prediction and marks of a held-out row as plain data."""
        one = np.array([row])
        batch = probe.task.held_out.batch(one)
        sides = tuple(batch["targets"].shape[1:])
        target = batch["targets"][0].numpy()
        prediction = probe.over(_predicted, probe.task.held_out, one).reshape(sides).numpy().astype(np.int64)
        marks = mistakes(prediction, target, self.marks)
        step = max(1, -(-max(sides) // _DISPLAYED))
        return {
            "image": _as_png(_displayable(batch["inputs"][0].numpy())[::step, ::step]),
            "mask": _as_png(target[::step, ::step].clip(min=0).astype(np.uint8)),
            "ignored": _as_png((target[::step, ::step] == IGNORE_INDEX).astype(np.uint8)),
            "prediction": _as_png(prediction[::step, ::step].astype(np.uint8)),
            "marks": {kind: [[x / step for x in place] for place in found] for kind, found in marks.items()},
        }

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Draw a row of four pictures for each case, and the held-out curves beneath."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        from lossworks.reporting.picture_style import STYLE

        if not pictured.get("cases"):
            return None
        with rc_context(STYLE):
            figure = Figure(figsize=(16, 17), dpi=80, layout="constrained", facecolor="white")
            upper, lower = np.asarray(figure.subfigures(2, height_ratios=(4, 1)))
            grid = upper.subplots(len(pictured["cases"]), 4)
            for row, case in zip(grid, pictured["cases"], strict=True):
                _draw_case(row, case, pictured["classes"])
            _draw_curves(lower.subplots(1, 2), curves)
        return figure


def mistakes(
    prediction: np.ndarray, target: np.ndarray, most: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Return where a map of classes breaks or misses components of a mask, and where it has others.

    Args:
        prediction: Classes (H, W), int64.
        target: Classes or -100, shape (H, W), int64; predictions on pixels of -100 don't count.
        most: Marks of each kind at most; those of the largest components are kept.

    Returns:
        ``broken`` and ``spurious``: x, y and radius in pixels of each mark.
    """
    valid = target != IGNORE_INDEX
    found: dict[str, list[tuple[int, Ring]]] = {"broken": [], "spurious": []}
    for label in np.unique(
        target[valid & (target > 0)].tolist() + prediction[valid & (prediction > 0)].tolist()
    ):
        own, said = valid & (target == label), valid & (prediction == label)
        found["broken"] += _broken(said, own)
        found["spurious"] += _untouched(said, own)
    return {
        kind: [mark for _, mark in sorted(marks, key=lambda one: -one[0])[:most]]
        for kind, marks in found.items()
    }


_NEIGHBOURS = np.ones((3, 3), dtype=bool)


def _broken(said: np.ndarray, own: np.ndarray) -> list[tuple[int, Ring]]:
    """Return the gaps that part a component of ``own``, (H, W) bool, and the components missed wholly."""
    pieces, _ = ndimage.label(said & own, _NEIGHBOURS)
    gaps, count = ndimage.label(own & ~said, _NEIGHBOURS)
    found = []
    for number, place in enumerate(ndimage.find_objects(gaps, count), start=1):
        around = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in place)
        gap = gaps[around] == number
        met = set(pieces[around][ndimage.binary_dilation(gap, _NEIGHBOURS)].tolist()) - {0}
        if len(met) != 1:  # it parts two pieces, or nothing of the component is left
            found.append(_mark(gap, around))
    return found


def _untouched(some: np.ndarray, others: np.ndarray) -> list[tuple[int, Ring]]:
    """Return the components of some, (H, W) bool, that have no pixel in common with the others."""
    labels, count = ndimage.label(some, _NEIGHBOURS)
    met = set(labels[others].tolist())
    return [
        _mark(labels[place] == number, place)
        for number, place in enumerate(ndimage.find_objects(labels, count), start=1)
        if number not in met
    ]


def _mark(component: np.ndarray, place: tuple[slice, ...]) -> tuple[int, Ring]:
    """Return the size of a component, and x, y and radius of a ring around it."""
    y, x = (float(axis.mean()) + side.start for axis, side in zip(component.nonzero(), place, strict=True))
    return int(component.sum()), (x, y, 3 + max(component.shape) / 2)


@dataclass(frozen=True)
class _Dice:
    """Measures the Dice of each image and whether it counts, both at the place of its number: (2·rows)."""

    rows: int

    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        targets = batch["targets"]
        valid = (targets != IGNORE_INDEX).flatten(1)
        answers = outputs.logits.argmax(-1).flatten(1)
        own = targets.flatten(1)
        agreed = (valid & (answers == own) & (own > 0)).sum(1).double()
        sizes = (valid & (answers > 0)).sum(1).double() + (valid & (own > 0)).sum(1).double()
        dice = torch.where(sizes > 0, 2 * agreed / sizes.clamp(min=1), 1.0)
        counts = valid.any(1).double()
        table = dice.new_zeros(2, self.rows)
        table.index_add_(1, batch["numbers"], torch.stack((dice * counts, counts)))
        return table.flatten()


def _predicted(outputs: Outputs, batch: Batch) -> Tensor:
    """Return the classes of one image's pixels, (H·W); 0 of a stand-in for it."""
    counts = (batch["targets"] != IGNORE_INDEX).any()
    return outputs.logits[0].argmax(-1).flatten().double() * counts


def _displayable(image: np.ndarray) -> np.ndarray:
    """Return an image (C, H, W) as (H, W, 3) uint8, each channel from its least to its largest value."""
    low, high = (edge(axis=(1, 2), keepdims=True) for edge in (image.min, image.max))
    spread = (image - low) / np.where(high > low, high - low, 1)
    shown = spread if len(spread) == 3 else np.repeat(spread[:1], 3, 0)
    return (255 * shown.transpose(1, 2, 0)).round().astype(np.uint8)


def _as_png(array: np.ndarray) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _of_png(text: str) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def _draw_case(axes: "Sequence[Axes]", case: Mapping[str, Any], classes: list[str]) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Circle

    mask, prediction, ignored = (
        _of_png(case[name]).astype(int) for name in ("mask", "prediction", "ignored")
    )
    shown = ("image", "mask", "prediction", "errors")
    for own, title in zip(axes, shown, strict=True):
        own.set(xticks=[], yticks=[])
        own.grid(visible=False)
        own.spines[:].set(visible=True, color="#e4e7eb")
        own.set_title(title)
    axes[0].set_ylabel(case["title"], fontsize=15)
    axes[0].imshow(_of_png(case["image"]))
    most = max(len(classes) - 1, 1)
    for own, values in zip(axes[1:3], (mask, prediction), strict=True):
        own.imshow(
            values, cmap="gray" if most == 1 else "nipy_spectral", vmin=0, vmax=most, interpolation="nearest"
        )
    wrong = np.where(prediction == mask, np.where(mask > 0, 1, 0), np.where(prediction == 0, 2, 3))
    shades = ListedColormap(["white", _RIGHT, _MISSED, _SPURIOUS, "#f3e9c6"])
    axes[3].imshow(np.where(ignored > 0, 4, wrong), cmap=shades, vmin=0, vmax=4, interpolation="nearest")
    for kind, colour in (("broken", _MISSED), ("spurious", _SPURIOUS)):
        for x, y, radius in case["marks"][kind]:
            axes[3].add_patch(Circle((x, y), radius, fill=False, color=colour, linewidth=2))
    broken, spurious = (len(case["marks"][kind]) for kind in ("broken", "spurious"))
    axes[3].set_title(f"errors: {broken} broken, {spurious} spurious")
    axes[3].set_xlabel("orange: missed; blue: too much")


def _draw_curves(axes: "Sequence[Axes]", curves: Mapping[str, Curve]) -> None:
    from lossworks.reporting.picture_style import BLUE, ORANGE, not_measured, step_axis

    for own, names in zip(axes, (("loss",), ("dice", "boundary_f")), strict=True):
        own.set_title("Held-out loss" if names == ("loss",) else "Held-out Dice and boundary F")
        for name, colour in zip(names, (BLUE, ORANGE), strict=False):
            if name in curves:
                own.plot(*curves[name], color=colour, marker="o", markersize=4, label=_CURVES[name])
        if own.lines:
            step_axis(own)
            own.set(ylabel=names[0] if len(names) == 1 else "share")
            own.legend()
        else:
            not_measured(own)
