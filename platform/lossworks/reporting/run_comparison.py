"""Runs of one task side by side: their yardsticks, their curves, and what differs in their specs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.reporting.finish import curves_of
from lossworks.reporting.picture_style import STYLE, save_picture, step_axis
from lossworks.reporting.series import Series
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Mode, Task
from lossworks.tasks.registry import task_of
from lossworks.trainables import OWN_VALUES
from lossworks.training.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Where runs keep their things says nothing of what they are.
_BESIDE_THE_POINT = ("name", "storage")
COLOURS = ("#2563a8", "#d9541e", "#2f8f4e", "#8a4fbf", "#b58900", "#c2307a", "#3aa0b8", "#5b6470")


@dataclass(frozen=True)
class Compared:
    """A run, as a comparison reads it.

    Attributes:
        folder: Of the run.
        spec: That it was last started with.
        metrics: The last value of every figure, by tracked name.
        curves: Steps and values of held-out figures and of the training loss, by tracked name.
        status: How it ended; ``running`` if nothing says so.
        digest: Of its data; empty where they are drawn or come with a library.
    """

    folder: RunFolder
    spec: RunSpec
    metrics: dict[str, float]
    curves: dict[str, Series]
    status: str
    digest: str

    @classmethod
    def read(cls, folder: RunFolder) -> Self:
        """Return what a run's folder holds.

        Raises:
            UserError: It is no training run, or has recorded nothing yet.
        """
        spec = folder.spec()
        if not folder.journal.is_file():
            raise UserError(f"run {folder.run_id}: has recorded nothing yet")
        curves = curves_of(folder)
        outcome = Outcome.stored(folder.outcome_file)
        last = {name: float(points[1][-1]) for name, points in curves.items()}
        learnt = Learnt.read(folder.learnt, f"run {folder.run_id}")
        return cls(
            folder,
            spec,
            last | (outcome.metrics if outcome else {}),
            curves,
            outcome.status if outcome else "running",
            learnt.digest if learnt else "",
        )

    @property
    def task(self) -> type[Task]:
        """What it trains."""
        return task_of(self.spec)

    @property
    def title(self) -> str:
        """The run's name and the beginning of its id."""
        return f"{self.spec.name} {self.folder.run_id[:8]}"

    @property
    def label(self) -> str:
        """The title, and what the run trains by."""
        return f"{self.title}, {' + '.join(self.spec.loss.titles)}"


@dataclass(frozen=True)
class RunComparison:
    """Several runs of one task."""

    runs: Sequence[Compared]

    @classmethod
    def of(cls, names: Sequence[str]) -> Self:
        """Return the comparison of runs that are named as :meth:`lossworks.runs.RunFolder.find` takes them.

        Raises:
            UserError: There are fewer than two or more than eight, one is given twice, or their tasks differ.
        """
        if not 2 <= len(names) <= len(COLOURS):
            raise UserError(f"{len(names)} runs are given: name from 2 to {len(COLOURS)}")
        runs = [Compared.read(RunFolder.find(name)) for name in names]
        paths = [run.folder.path for run in runs]
        for path in paths:
            if paths.count(path) > 1:
                raise UserError(f"run {path.name}: is given twice")
        first = runs[0]
        for run in runs[1:]:
            if run.task is not first.task:
                raise UserError(
                    f"run {run.folder.run_id[:8]} is of task {run.task.slug} and run "
                    f"{first.folder.run_id[:8]} of {first.task.slug}: they share no yardsticks"
                )
        return cls(runs)

    @property
    def task(self) -> type[Task]:
        """The task of all of them."""
        return self.runs[0].task

    @property
    def same_loss(self) -> bool:
        """Whether all train the same loss, so that its values can be compared."""
        losses = [[term.model_dump() for term in run.spec.loss.terms] for run in self.runs]
        return all(loss == losses[0] for loss in losses)

    def yardsticks(self) -> list[tuple[str, str, str, Mode | None]]:
        """Return label, tracked name, format and better direction of what is shown; None for neither."""
        better: dict[str, Mode] = {}
        for run in self.runs:
            better |= self.task.measured_by(run.spec)
        if self.same_loss:
            better["eval/loss"] = "min"
        known = [("held-out loss", "eval/loss", "{:.4f}"), *self.task.shown]
        named = {name for _, name, _ in known}
        known += [(name.removeprefix("eval/"), name, "{:.4g}") for name in better if name not in named]
        known.append((f"{self.task.unit}/s", f"train/{self.task.unit}_per_second", "{:,.0f}"))
        there = {name for run in self.runs for name in run.metrics}
        return [(label, name, text, better.get(name)) for label, name, text in known if name in there]

    def best(self, name: str, mode: Mode | None) -> list[int]:
        """Return which runs are best by a yardstick, by their place; none where there is no better."""
        values = [run.metrics.get(name, math.nan) for run in self.runs]
        finite = [value for value in values if math.isfinite(value)]
        if mode is None or len(finite) < 2 or min(finite) == max(finite):
            return []
        aim = max(finite) if mode == "max" else min(finite)
        return [place for place, value in enumerate(values) if value == aim]

    def differences(self) -> list[tuple[str, list[str]]]:
        """Return the fields of specs that differ, with each run's value as YAML has it, ``-`` for none."""
        flats = [run.spec.flat() for run in self.runs]
        names = dict.fromkeys(name for flat in flats for name in flat)
        found = []
        for name in names:
            if name in _BESIDE_THE_POINT or name.startswith("tracking."):
                continue
            values = [flat.get(name) for flat in flats]
            if any(value != values[0] for value in values):
                found.append((name, [_text(value) for value in values]))
        return found

    def notes(self) -> list[str]:
        """Return what must be known before figures are held against each other."""
        found = []
        digests = {run.digest for run in self.runs}
        if len(digests) > 1 or len({_text(run.spec.flat().get("data.source")) for run in self.runs}) > 1:
            found.append("the runs' data differ: their figures are of different held-out rows")
        if not self.same_loss:
            found.append("the runs train different losses: held-out losses can't be compared, yardsticks can")
        unfinished = [f"{run.title} ({run.status})" for run in self.runs if run.status != "finished"]
        if unfinished:
            found.append(f"not finished: {', '.join(unfinished)}")
        seeds = {run.spec.seed for run in self.runs}
        found.append(
            "one run of each says little of chance: `lossworks study --compare` trains several seeds"
            if len(seeds) == 1
            else "the runs' seeds differ, and so does what chance gave them"
        )
        return found

    def draw(self, path: Path) -> Path:
        """Draw the curves of loss and yardsticks, a colour a run, as PNG and as SVG beside it.

        Raises:
            UserError: The folder isn't there, or the name doesn't end with .png.
        """
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        if path.suffix != ".png":
            raise UserError(f"--to {path}: must end with .png; the same is written beside it as .svg")
        if not path.parent.is_dir():
            raise UserError(f"--to {path}: there is no folder {path.parent}")
        shown = [("training loss", "train/loss"), *((label, name) for label, name, _, _ in self.yardsticks())]
        if not self.same_loss:  # whose values are on scales of their own
            shown = [(label, name) for label, name in shown if name not in OWN_VALUES]
        shown = [(label, name) for label, name in shown if any(name in run.curves for run in self.runs)][:8]
        columns = 2 if len(shown) > 1 else 1
        lines = math.ceil(len(shown) / columns)
        with rc_context(STYLE):
            figure = Figure(
                figsize=(8 * columns, 1.2 + 3.6 * lines), dpi=100, layout="constrained", facecolor="white"
            )
            axes = figure.subplots(lines, columns, squeeze=False).ravel()
            for place, (label, name) in zip(axes, shown, strict=False):
                self._draw_curves(place, label, name)
            for place in axes[len(shown) :]:
                place.set_visible(False)
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=min(len(self.runs), 3))
            save_picture(figure, path)
        return path

    def _draw_curves(self, axes: "Axes", label: str, name: str) -> None:
        axes.set_title(label[:1].upper() + label[1:])
        for run, colour in zip(self.runs, COLOURS, strict=False):
            points = run.curves.get(name)
            if points is None:
                axes.plot([], [], color=colour, label=run.label)
                continue
            axes.plot(
                *points,
                color=colour,
                marker="o" if points[0].size <= 50 else "",
                markersize=4,
                label=run.label,
            )
        step_axis(axes)
        axes.set_ylabel(label)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list) and value and all(isinstance(one, dict) and "name" in one for one in value):
        return ", ".join(str(one["name"]) for one in value)
    return (
        f"{value:g}"
        if isinstance(value, float)
        else str(value).lower()
        if isinstance(value, bool)
        else str(value)
    )
