"""What a kind of training is: its data, its model, which losses it takes, and how it is measured."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from lossworks.catalogue.declaration import Declaration
from lossworks.catalogue.registry import create, declaration, declarations, entry_class
from lossworks.data import Order, SequenceOrder
from lossworks.data.batch import Batch
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, Outputs
from lossworks.specs import RunSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Mode = Literal["min", "max"]
Say = Callable[[str], None]


class ExampleRows(Protocol):
    """Training data read by row: sequences of a text, or examples."""

    def __len__(self) -> int:
        """Return how many rows there are."""

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of rows (B,), each tensor with B entries."""


@dataclass(frozen=True)
class Evaluation:
    """A model measured on held-out data, over all ranks.

    Attributes:
        loss: Of the training's own objective, a mean over its elements; it chooses the best checkpoint.
        yardsticks: Figures that compare models whatever loss trained them, by tracked name.
        pictured: What the report draws of it, by name, as plain data.
    """

    loss: float
    yardsticks: dict[str, float]
    pictured: dict[str, Any] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Return all values under their tracked names."""
        return {"eval/loss": self.loss, **self.yardsticks}


@dataclass(frozen=True)
class Simplest:
    """What an answer gets that looks at no input: a model that is no better has learnt nothing of its inputs.

    Attributes:
        title: The answer, in words.
        yardsticks: What it gets on held-out data, by tracked name.
    """

    title: str
    yardsticks: Mapping[str, float]


@dataclass(frozen=True)
class Prepared:
    """What the driver makes once, for all workers.

    Attributes:
        folder: Of what workers open, such as tokens; None if each reads the data for itself.
        guess: The loss of a uniform guess under cross-entropy, which the report marks; None if there is none.
        learnt: What the run keeps of its data beside its checkpoints; None of a task that learns nothing.
        simplest: What a model must be better than; None if the task knows none.
    """

    folder: Path | None = None
    guess: float | None = None
    learnt: Learnt | None = None
    simplest: Simplest | None = None


@dataclass(frozen=True)
class Predictions:
    """What a trained model says of a file.

    Attributes:
        columns: Of the output, by name, a value for each row of the file.
        given: The file's own columns, which the output repeats in front.
        notes: What a person should know of it, in a sentence each.
        files: What belongs to the output beside the table, such as masks: the content of each file by its
            name, made when it is asked for.
    """

    columns: Mapping[str, Sequence[Any]]
    given: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)


Measure = Callable[[Outputs, Batch], Tensor]
"""Called inside the model's forward; returns numbers (S,) that add up over rows."""

Sums = Callable[[Measure, ExampleRows, np.ndarray], Tensor]
"""Called with what to measure inside the forward, where rows are read, and which: float64 sums (S,)."""


class Task(ABC):
    """One kind of training; a new kind is a class in a file of its own, named by an entry point.

    Attributes:
        slug: Its name, in kebab case.
        title: What is trained on what, in one line.
        unit: What throughput is counted in.
        spec: The class of its specs.
        kinds: Kinds of losses that it takes; see ``lossworks losses``.
        provides: Names that its batches hold; see :mod:`lossworks.data.batch`.
        yardsticks: What it measures besides the trained loss, by tracked name, and which direction is better.
        shown: For tables and summaries: label, tracked name and format of each figure.
        prepares_long: Whether ``prepare`` may take minutes, so that Ray starts meanwhile.
        element: What losses are means over, in the singular; None for the unit.
        companions_read_alike: Whether a companion must read inputs and classes as the model does.
        classifies: Whether its targets are classes and its outputs logits, one class a row.
        flops_formula: How ``flops_per_unit`` counts, in words.
        units_per_row: Units of throughput that a row holds.
        panels: What the report draws over the steps: a heading, and one or two labels by tracked name; None
            for the learning rate and the head's memory.
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str]
    spec: ClassVar[type[RunSpec]]
    kinds: ClassVar[tuple[str, ...]]
    provides: ClassVar[tuple[str, ...]] = ("inputs", "targets")
    yardsticks: ClassVar[Mapping[str, Mode]]
    shown: ClassVar[Sequence[tuple[str, str, str]]] = ()
    prepares_long: ClassVar[bool] = False
    classifies: ClassVar[bool] = False
    companions_read_alike: ClassVar[bool] = True
    element: ClassVar[str | None] = None
    panels: ClassVar[tuple[str, Mapping[str, str]] | None] = None

    flops_formula: ClassVar[str] = "three times the products of a forward pass, counted as it runs"

    units_per_row: int = 1
    train: ExampleRows
    held_out: ExampleRows

    def __init__(self, spec: RunSpec, learnt: Learnt | None = None) -> None:
        del learnt
        self.spec_of_run = spec
        self.objective = Objective(spec.loss)

    @classmethod
    def open(cls, spec: RunSpec, folder: Path | None, learnt: Learnt | None = None) -> "Task":
        """Return the task of a spec, with its data.

        Args:
            spec: The run.
            folder: What ``prepare`` made for it.
            learnt: What the model has learnt from data before, which holds whatever its data say now.

        Raises:
            UserError: The data can't be used, or don't fit what was learnt.
        """
        del folder
        return cls(spec, learnt)

    @classmethod
    def open_blank(cls, spec: RunSpec, learnt: Learnt | None = None) -> "Task":
        """Return the task of a spec for its shapes alone; data are read only if the spec doesn't say them.

        Args:
            spec: The run.
            learnt: What the model has learnt that it starts from.

        Raises:
            UserError: The data that are read can't be used.
        """
        return cls.open(spec, None, learnt)

    def build_companion(self, model: Mapping[str, Any], *, empty: bool = False) -> HeadedModel:
        """Return the untrained model of a companion.

        Args:
            model: The model's part of its spec, as plain data.
            empty: Whether its parameters may hold anything.

        Raises:
            UserError: The model doesn't fit the data.
        """
        return self.empty_model(model) if empty else self.build_model(model)

    @classmethod
    def takes_models_of(cls, slug: str) -> bool:
        """Return whether a model that another task has trained can be a companion here.

        Args:
            slug: Of that task.
        """
        return slug == cls.slug

    @classmethod
    def adopting(cls, spec: RunSpec, learnt: Learnt, role: str | None = None) -> RunSpec:
        """Return a run with what it leaves to another model, such as the tokenizer; as it is, mostly.

        Args:
            spec: The run.
            learnt: What the other model has learnt of its data besides weights.
            role: What that model is to this one; None where this one begins from it.
        """
        del learnt, role
        return spec

    @classmethod
    def element_of(cls, spec: RunSpec) -> str:
        """Return what the losses of a run are means over, in the singular."""
        del spec
        return cls.element or cls.unit.removesuffix("s")

    @property
    def learnt(self) -> Learnt:
        """What the model needs ever after of the data, besides weights; nothing unless a task says so."""
        return Learnt({})

    @classmethod
    def answers(cls, spec: RunSpec) -> bool:
        """Return whether a run's held-out rows have answers that are wholly right or wrong."""
        del spec
        return cls.classifies

    @classmethod
    def require_classifier(cls, what: str) -> None:
        """Refuse if it doesn't train classifiers.

        Args:
            what: Who does what with classifiers, such as ``analyses: coverage draws answers of``.

        Raises:
            UserError: It doesn't.
        """
        if not cls.classifies:
            raise UserError(f"{what} classifiers, not task={cls.slug}")

    @classmethod
    def prepare(cls, spec: RunSpec, say: Say | None = None, learnt: Learnt | None = None) -> Prepared:
        """Read the data once, before workers do, and check that model and data fit.

        Args:
            spec: The run.
            say: Called with what is going on.
            learnt: What the model has learnt from data before.

        Raises:
            UserError: The data can't be used, or the model doesn't fit them.
        """
        del say
        task = cls.open(spec, None, learnt)
        task.build_model()
        return Prepared(learnt=task.learnt, simplest=task.simplest())

    def simplest(self) -> Simplest | None:
        """Return what an answer gets that looks at no input, or None if the task knows none."""
        return None

    @classmethod
    def compared_by(cls) -> str:
        """Return the yardstick, by tracked name, in which clients of a federation are compared."""
        return next(iter(cls.yardsticks))

    @classmethod
    def measured_by(cls, spec: RunSpec) -> dict[str, Mode]:
        """Return all yardsticks of a run, those of its methods and analyses among them."""
        found = dict(cls.yardsticks)
        for entry in (*spec.methods, *spec.analyses):
            found |= entry_class(entry.name).yardsticks  # type: ignore[attr-defined]
        return found

    @classmethod
    def takes(cls, entry: Declaration, spec: RunSpec | None = None) -> bool:
        """Return whether a loss can train it.

        Args:
            entry: The loss.
            spec: The run; None asks whether there is any run that it can train.
        """
        del spec
        return entry.kind in cls.kinds and set(entry.requires) <= set(cls.provides)

    @classmethod
    def require_entries(cls, spec: RunSpec) -> None:
        """Refuse losses, methods and analyses that a run can't have, and companions that nothing reads.

        Raises:
            ValueError: Naming those that can, and the tasks that the loss could train; or the companion.
        """
        for term in spec.loss.terms:
            if not cls.takes(declaration(term.name), spec):
                raise ValueError(cls._refusal(term.name, spec))
        if all("beside" in declaration(term.name).flags for term in spec.loss.terms):
            raise ValueError(
                f"loss.name={spec.loss.name} says nothing of the targets: put a loss of those beside it, "
                f"loss: [{{name: cross-entropy}}, {{name: {spec.loss.name}, weight: …}}]"
            )
        for entry in (*spec.methods, *spec.analyses):
            create(entry.name, **entry.hyperparameters).check(cls, spec)
        cls._require_roles(spec)

    @classmethod
    def _require_roles(cls, spec: RunSpec) -> None:
        read = {role: entry.slug for entry in readers(spec) for role in entry.roles}
        for role, reader in read.items():
            if role not in spec.roles:
                raise ValueError(
                    f"roles: {reader} reads a companion named {role}; set roles.{role} to a run, to a folder "
                    "of trained weights, to start, or to {ema: 0.99}"
                )
        known = {**read, **dict.fromkeys(cls.reads(spec), cls.slug)}
        for role in spec.roles:
            if role not in known:
                hint = f"what is read: {', '.join(known)}" if known else "no loss or method reads any"
                raise ValueError(f"roles.{role}: nothing here reads a companion of that name; {hint}")

    @classmethod
    def reads(cls, spec: RunSpec) -> tuple[str, ...]:
        """Return the roles that a run's task itself reads, beside those that its entries read."""
        del spec
        return ()

    @classmethod
    def _refusal(cls, slug: str, spec: RunSpec) -> str:
        from lossworks.tasks.registry import usable_tasks

        able = ", ".join(name for name, entry in declarations().items() if cls.takes(entry, spec))
        text = f"loss.name={slug} can't train task={cls.slug} as it is here; what can: {able}"
        entry = declaration(slug)
        others = [task.slug for task in usable_tasks()[0] if task.slug != cls.slug and task.takes(entry)]
        if others:
            text += f"; {slug} trains task={' or '.join(others)}"
        return text + (f"; {cls.condition(entry)}" if cls.condition(entry) else "")

    @classmethod
    def condition(cls, entry: Declaration) -> str:
        """Return what a run of this task would need for a loss that it takes in other runs, or nothing."""
        del entry
        return ""

    @classmethod
    def obstacle(cls, spec: RunSpec) -> str | None:
        """Return why runs can't be trained many at once in one process, or None if they can."""
        del spec
        return f"task={cls.slug} is not trained many runs at once"

    @classmethod
    def shaping(cls, spec: RunSpec) -> str:
        """Return what of a run's loss decides how model and batches look, as the JSON of a loss's spec.

        Runs that are trained at once must agree in it.
        """
        del spec
        return "{}"

    def order(self) -> Order:
        """Return the order in which training visits the rows."""
        spec = self.spec_of_run
        return SequenceOrder(len(self.train), spec.batch_size, spec.seed)

    def row_classes(self) -> np.ndarray | None:
        """Return a class of each training row, by which rows can be dealt unevenly, int64 (N,) from 0.

        None of a task that knows none.
        """
        return None

    def row_owners(self) -> np.ndarray | None:
        """Return whom each training row belongs to, (N,) of anything that sorts; None if nobody asked."""
        return None

    @property
    def data_bytes(self) -> int:
        """Bytes of memory that the data take in every worker; 0 where they are read as they are needed."""
        return 0

    @abstractmethod
    def build_model(self, model: Mapping[str, Any] | None = None) -> HeadedModel:
        """Return the untrained model.

        Args:
            model: The model's part of another spec, as plain data, for a companion; None for this run's.

        Raises:
            UserError: The model doesn't fit the data.
        """

    def empty_model(self, model: Mapping[str, Any] | None = None) -> HeadedModel:
        """Return a model like the untrained one whose parameters may hold anything; arguments as there.

        Raises:
            UserError: The model doesn't fit the data.
        """
        return self.build_model(model)

    def completed(self, batch: Batch, companions: Callable[[Batch, str], dict[str, Outputs]]) -> Batch:
        """Return a batch with what companions of the model give for it, where losses read that by a name.

        Args:
            batch: A micro-batch.
            companions: From a batch and the name of what is read to the outputs of every companion.
        """
        del companions
        return batch

    @abstractmethod
    def counts(self, batch: Batch) -> tuple[float, float]:
        """Return how many units a batch holds, and a further count that the metrics need."""

    def train_metrics(self, loss: float, units: float, further: float) -> dict[str, float]:
        """Return the metrics of a step.

        Args:
            loss: The objective's value over all ranks.
            units: First count of all batches.
            further: Second count of all batches.
        """
        del units, further
        return {"train/loss": loss}

    @abstractmethod
    def measure(self, outputs: Outputs, batch: Batch, own: Tensor) -> Tensor:
        """Return the sums of the yardsticks, float64 (S,); called inside the model's forward.

        Args:
            outputs: Of the model.
            batch: Its rows; those that count for nothing must not matter.
            own: The sums of the objective, which need not be computed again.
        """

    @abstractmethod
    def figures(self, sums: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
        """Return yardsticks by tracked name, and what the report draws, from sums over all rows and ranks."""

    def measured(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return counts and sums of the objective, and those of the yardsticks behind them."""
        own = self.objective(outputs, batch)
        counts = torch.tensor(self.objective.counts(batch), dtype=torch.float64, device=own.device)
        return torch.cat((counts, own.double(), self.measure(outputs, batch, own)))

    def evaluation(self, sums: Tensor) -> Evaluation:
        """Return the figures from sums over all micro-batches and ranks, as ``measured`` gives them."""
        terms = len(self.objective.titles)
        size = sum(self.objective.sizes)
        counts, own, rest = sums[:terms].tolist(), sums[terms : terms + size], sums[terms + size :]
        loss, _ = self.objective.value(own, counts)
        yardsticks, pictured = self.figures(rest)
        return Evaluation(loss, yardsticks, pictured)

    def flops_per_unit(self, model: HeadedModel) -> float | None:
        """Return the floating-point operations of a training step a unit, or None if not known."""
        del model
        return None

    def head_rows(self, ranks: int) -> int | None:
        """Return how many rows of features the head of one of so many ranks takes at once.

        None where the head is so small that its memory is not worth a look.
        """
        del ranks
        return None

    @classmethod
    def draw(cls, axes: "Axes", pictured: Mapping[str, Any]) -> bool:
        """Draw the last panel of a report from what evaluations gave; return whether there is anything."""
        del axes, pictured
        return False

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in the order of their numbers; empty where there are none."""
        return ()

    @classmethod
    def reopen(
        cls, spec: RunSpec, folder: Path, learnt: Learnt, fill: Callable[[HeadedModel], None]
    ) -> "tuple[Task, HeadedModel]":
        """Return the task of an exported model, with the data of a spec, and the model in eval mode.

        Args:
            spec: The run that the model is from, perhaps with other data.
            folder: What ``save`` wrote.
            learnt: What it holds besides weights.
            fill: Puts the folder's weights into a model.

        Raises:
            UserError: The folder or the data can't be read, or they don't fit each other.
        """
        del folder
        task = cls.open(spec, None, learnt)
        model = task.build_model()
        fill(model)
        return task, model.eval()

    @classmethod
    def predict(cls, folder: Path, file: Path) -> Predictions:
        """Return what an exported model says of a file; a task that can't does nothing.

        Args:
            folder: What ``save`` wrote.
            file: Of a kind that the model can read, or a folder of such files.

        Raises:
            UserError: The file can't be read, or the task predicts nothing of files.
        """
        del file
        raise UserError(f"{folder}: a model of task={cls.slug} predicts nothing of files")

    @classmethod
    @abstractmethod
    def save(
        cls,
        spec: RunSpec,
        learnt: Learnt,
        to: Path,
        state: Mapping[str, Tensor],
        provenance: Mapping[str, Any],
    ) -> None:
        """Write a trained model as a folder that can be used without the run; no data are read.

        Args:
            spec: The run.
            learnt: What it has learnt besides weights.
            to: Absent or empty.
            state: The model's unsharded ``state_dict()``, without losses.
            provenance: Where it comes from; anything JSON can hold.

        Raises:
            UserError: ``to`` isn't empty.
        """


def readers(spec: RunSpec) -> list[Declaration]:
    """Return the losses, methods and analyses of a run that read companions of the model."""
    named = (*spec.loss.terms, *spec.methods, *spec.analyses)
    return [entry for entry in (declaration(one.name) for one in named) if entry.roles]


def as_sums(*values: Tensor | float, like: Tensor) -> Tensor:
    """Return numbers as float64 (S,) on the device of ``like``."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=like.device) for value in values])
