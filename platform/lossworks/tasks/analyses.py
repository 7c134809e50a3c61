"""Analyses: what is measured of a trained model on a fixed probe, or of several runs together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lossworks.catalogue.entry import Settings
from lossworks.errors import UserError
from lossworks.specs import RunSpec
from lossworks.tasks.interface import ExampleRows, Mode, Sums, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""


@dataclass(frozen=True)
class Finding:
    """What an analysis found.

    Attributes:
        figures: Numbers by name.
        pictured: What its picture is drawn of, as plain data; empty if there is nothing to draw.
        notes: What a person should know of it, in a sentence each.
    """

    figures: dict[str, float]
    pictured: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Probe:
    """A model as an analysis sees it: through sums over rows of data and over ranks.

    Attributes:
        task: With its data, in the order in which they are stored.
        over: Sums what it is given inside the model's forward, in evaluation mode; every rank calls.
        held_out: Which held-out rows an evaluation reads.
        model: The distributed model, for analyses that look at its parts while ``over`` runs it.
    """

    task: Task
    over: Sums
    held_out: np.ndarray
    model: nn.Module


@dataclass(frozen=True)
class NumberedRows:
    """Rows of data whose batches say which rows they hold, for what is measured of each by itself.

    Attributes:
        data: The rows.
    """

    data: ExampleRows

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of rows (B,), and their ``numbers`` (B,), int64."""
        return {**self.data.batch(rows), "numbers": torch.from_numpy(np.ascontiguousarray(rows))}


@dataclass(frozen=True)
class RunCurves:
    """A run as an analysis of several runs sees it.

    Attributes:
        name: What tables and pictures call it.
        spec: What it trained.
        curves: Steps and values of each tracked figure.
    """

    name: str
    spec: RunSpec
    curves: Mapping[str, Curve]

    def last(self, figure: str) -> float:
        """Return the last value of a figure.

        Raises:
            UserError: The run has not measured it.
        """
        if figure not in self.curves:
            raise UserError(f"run {self.name}: has no {figure}; it has {', '.join(sorted(self.curves))}")
        return float(self.curves[figure][1][-1])


class Analysis(Settings):
    """An analysis; one of models implements ``measure``, one of runs ``compare``, and both may draw.

    Attributes:
        subject: ``model``: it can be named in a spec, and is then measured with each evaluation; ``runs``: it
            compares runs that have ended.
        yardsticks: Of what it finds, by tracked name: that by which runs can be compared, and which direction
            is better.
    """

    section: ClassVar[str] = "analyses"
    kind: ClassVar[str] = "analysis"
    subject: ClassVar[Literal["model", "runs"]] = "model"
    yardsticks: ClassVar[Mapping[str, Mode]] = {}

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse runs that it can't analyse, before anything starts.

        Raises:
            UserError: Naming what it needs.
        """
        del task, spec
        if self.subject == "runs":
            raise UserError(
                f"analyses: {self.slug} compares runs: use `lossworks analyse {self.slug} RUN RUN`"
            )

    def measure(self, probe: Probe) -> Finding:
        """Return what it finds of a model; every rank calls.

        Raises:
            UserError: The data don't allow it.
        """
        raise NotImplementedError

    def compare(self, runs: Sequence[RunCurves]) -> Finding:
        """Return what it finds of runs that have ended.

        Raises:
            UserError: They are not what it compares.
        """
        raise NotImplementedError

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Return the picture of a finding, or None if there is nothing to draw.

        Args:
            pictured: As the finding has it.
            curves: Of a run that measured it with each evaluation: steps and values by figure.
        """
        del pictured, curves
        return None
