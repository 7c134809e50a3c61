"""The spec of a federation, and of a strategy in it."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

from pydantic import Field, create_model, field_validator, model_validator

from lossworks.adapters.pydantic_private import fill_in, replace_extra
from lossworks.catalogue.declaration import Declaration
from lossworks.errors import UserError
from lossworks.specs import ClassifierModelSpec, ExamplesSpec, LossSpec, RunSpec, Spec, TrackingSpec
from lossworks.specs.base import OpenSpec, Seed, Storage, apply_overrides
from lossworks.specs.optimisation import LoraSpec
from lossworks.tasks.registry import asked_task, task_class, task_slugs
from lossworks_federated.apps.app_spec import AppSpec
from lossworks_federated.privacy import require_compatible
from lossworks_federated.spec_parts import (
    FaultSpec,
    GuardSpec,
    LocalSpec,
    MeasureSpec,
    NodesSpec,
    PrivacySpec,
    SplitSpec,
    TaskSpec,
    UpdatesSpec,
)
from lossworks_federated.strategies.catalogue import (
    ASYNCHRONOUS,
    CLIENT_PART,
    EXCHANGES,
    KEEPS,
    PLAIN_SGD,
    POOLED,
    REPORTS,
    WHOLE_UPDATES,
    check_also,
    check_settings,
    declaration,
    part_of,
)
from lossworks_federated.virtual.device_specs import DevicesSpec

_USUAL = "classification"
_OF_RUNS = ("workers", "sharding", "data", "model", "lora", "loss", "start")


class StrategySpec(OpenSpec):
    """A strategy with its hyperparameters, which are fields beside ``name``: ``{name: fedprox, mu: 0.1}``.

    ``fedavg`` alone is short for ``{name: fedavg}``.
    """

    shorthand: ClassVar[str | None] = "name"
    open_to: ClassVar[str | None] = "name"

    name: str = Field("fedavg", description="slug; `lossworks federate --strategies` lists them")
    label: str | None = Field(
        None, min_length=1, max_length=60, description="name in tables and pictures; default: what is set"
    )
    lr: float | None = Field(
        None, gt=0.0, le=10.0, description="learning rate of clients in place of local.lr"
    )
    deadline: float | None = Field(
        None,
        gt=0.0,
        le=1e12,
        description="virtual seconds after which a reply is left out as late; null for no such limit",
    )
    over_selection: float = Field(
        1.0,
        ge=1.0,
        le=100.0,
        description="factor by which more clients than clients_per_round are asked, of which the first to "
        "answer in virtual time are taken and the others left out as late",
    )
    also: tuple[dict[str, Any], ...] = Field(
        (),
        description="methods whose client part is added, such as [fedlex] or [{name: fedprox, mu: 0.1}]",
    )

    @field_validator("also", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        entries = [value] if isinstance(value, str | dict) else value
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The strategy's hyperparameters, defaults included."""
        return dict(self.model_extra or {})

    @property
    def title(self) -> str:
        """What tables and pictures call it: the label, or the name and what was set."""
        if self.label:
            return self.label
        usual = check_settings(self.name, {})
        variant = f" ({self.hyperparameters['variant']})" if "variant" in usual else ""
        set_here = [
            f"{name}={value}"
            for name, value in self.hyperparameters.items()
            if value != usual[name] and name != "variant"
        ]
        set_here += [f"lr={self.lr:g}"] if self.lr is not None else []
        set_here += [f"deadline={self.deadline:g}"] if self.deadline is not None else []
        set_here += [f"over_selection={self.over_selection:g}"] if self.over_selection > 1 else []
        others = "".join(f" + {entry['name']}" for entry in self.also)
        return " ".join([self.name + variant + others, *set_here])

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Check the hyperparameters and give the others their defaults, which are stored with a run."""
        resolved = check_settings(self.name, self.model_extra or {})
        replace_extra(self, resolved)
        fill_in(self, also=tuple(check_also(self.name, entry) for entry in self.also))
        return self


class FederationSpec(Spec):
    """A comparison of strategies over seeds, or one strategy with one seed.

    ``data`` and ``model`` are of the task's own classes; see :func:`federation_class`.
    """

    command: ClassVar[str | None] = "federate"

    kind: Literal["federation"] = Field("federation", description="what the spec describes")
    name: str = Field("federate", min_length=1, max_length=100, description="name of the run in MLflow")
    engine: Literal["cohort", "sequential", "flower"] = Field(
        "cohort",
        description="cohort (a round's clients trained at once in this process), sequential (any ClientApp, "
        "one client after the other in this process) or flower (Flower's simulation over Ray)",
    )
    app: AppSpec | None = Field(
        None,
        description="ClientApp of another package that clients run in place of ours, with its run "
        "configuration; null for ours",
    )
    strategies: tuple[StrategySpec, ...] = Field(
        default_factory=lambda: (StrategySpec(),),  # not now: the strategies import this module
        min_length=1,
        description="strategies to compare: slugs or mappings",
    )
    seeds: tuple[Seed, ...] = Field(
        (0,), min_length=1, description="seeds; each has its own split, initial parameters and orders"
    )
    rounds: int = Field(30, ge=1, le=1_000_000, description="rounds of training")
    clients_per_round: int | None = Field(None, ge=1, description="clients drawn each round; all if unset")
    min_replies: int = Field(1, ge=1, description="usable replies below which a round, and the run, fails")
    deadline_s: float | None = Field(
        None, gt=0.0, description="seconds that a round waits for replies; null for Flower's hour"
    )
    checkpoint_every: int = Field(1, ge=1, description="rounds between saved states")
    storage: Storage = Field(None, description="absolute folder of runs; default: runs/ in the home folder")
    task: str = Field(_USUAL, description="what clients train; `lossworks tasks` lists what there is")
    data: ExamplesSpec = ExamplesSpec()
    split: SplitSpec = SplitSpec()
    nodes: NodesSpec = NodesSpec()
    model: ClassifierModelSpec = ClassifierModelSpec(width=64)
    start: str | None = Field(
        None, min_length=1, description="trained weights to begin from: a run, a folder of an export, hf:PATH"
    )
    lora: LoraSpec = LoraSpec()
    loss: LossSpec = LossSpec()
    local: LocalSpec = LocalSpec()
    devices: DevicesSpec = DevicesSpec()
    faults: FaultSpec = FaultSpec()
    guard: GuardSpec = GuardSpec()
    updates: UpdatesSpec = UpdatesSpec()
    privacy: PrivacySpec = PrivacySpec()
    measure: MeasureSpec = MeasureSpec()
    tracking: TrackingSpec = TrackingSpec()

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, source: str = "spec") -> Self:
        """See :meth:`Spec.parse`; the class is that of the task that the values name."""
        cls.require_own(values, source)
        kind = _class_of(values, source)
        if kind is cls:
            return super().parse(values, source=source)
        return cast("Self", kind.parse(values, source=source))

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """See :meth:`Spec.read`; the class is that of the task that the file, or an override, names."""
        values = cls.read_values(path)
        kind = _class_of({**values, **asked_task(overrides)}, str(path))
        return cast("Self", kind.parse(apply_overrides(kind, values, overrides), source=str(path)))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._require_trainable()
        if (self.split.kind == "natural") != (getattr(self.data, "owner", None) is not None):
            raise ValueError("split.kind=natural and data.owner need each other")
        if getattr(self.model, "dropout", 0.0):
            raise ValueError(
                f"model.dropout={self.model.dropout}: must be 0, since what is dropped would depend on who "
                "else is trained in the same process"
            )
        if self.clients_per_round is not None and self.clients_per_round > self.split.clients:
            raise ValueError(
                f"clients_per_round={self.clients_per_round}: there are only split.clients="
                f"{self.split.clients} to draw from; leave it out to ask all"
            )
        if self.min_replies > min(self.clients_per_round or self.split.clients, self.split.clients):
            raise ValueError(f"min_replies={self.min_replies}: more than the clients of a round")
        if self.faults.straggle and self.engine != "cohort" and self.deadline_s is None:
            raise ValueError(
                f"faults.straggle with engine={self.engine} needs a deadline_s that they outlast"
            )
        self.faults.require_clients(self.split.clients)
        titles = [strategy.title for strategy in self.strategies]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"strategies: {title} is there twice; set label to tell them apart")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: the same seed twice gives the same result twice")
        for strategy in self.strategies:
            self._require_fit(strategy)
        return self

    def _require_trainable(self) -> None:
        """Refuse what clients can't train, and what would depend on who else is trained with them."""
        try:
            run = self.run_spec()
        except UserError as error:
            raise ValueError(str(error)) from None
        run.loss.require(_of_elements, "the clients of a federation")
        for term in run.loss.terms:
            if term.weight.final is not None:
                raise ValueError(f"loss.weight of {term.name}: clients take constant ones, not {term.weight}")

    def run_spec(self, seed: int = 0) -> RunSpec:
        """Return the training of one process that a client's is like.

        Raises:
            UserError: The task can't train it.
        """
        values: dict[str, Any] = {"task": self.task, "seed": seed, "name": self.name}
        values |= {"workers": 1, "sharding": "none", "batch_size": self.local.batch_size, "start": self.start}
        for name in ("data", "model", "lora", "loss"):
            values[name] = getattr(self, name).model_dump(mode="json", exclude_unset=True)
        return task_class(self.task).spec.parse(values, source="as a training of one process")

    def _require_fit(self, strategy: StrategySpec) -> None:
        others = [entry["name"] for entry in strategy.also]
        require_compatible(strategy.name, others, self.privacy, self.guard)
        whole = WHOLE_UPDATES in declaration(strategy.name).flags
        self.updates.require_fit(strategy.name, whole_updates=whole, guard=self.guard, privacy=self.privacy)
        plain = self.local.optimizer == "sgd" and not self.local.momentum
        for name in (strategy.name, *others):
            if PLAIN_SGD in declaration(name).flags and not plain:
                raise ValueError(f"{name} needs local.optimizer=sgd and local.momentum=0")
        asynchronous = ASYNCHRONOUS in declaration(strategy.name).flags
        if strategy.deadline is not None and not self.devices.declared:
            raise ValueError(
                f"{strategy.name}: deadline={strategy.deadline:g} is of virtual time, which passes "
                "only where devices are declared, such as devices.speed=100"
            )
        if asynchronous:
            self._require_asynchronous(strategy)
        elif strategy.over_selection > 1:
            self._require_over_selection(strategy)

    def _require_over_selection(self, strategy: StrategySpec) -> None:
        told = f"{strategy.name}: over_selection={strategy.over_selection:g}"
        if self.clients_per_round is None or not self.devices.declared:
            raise ValueError(f"{told} needs clients_per_round and devices, whose speeds say who is first")
        asked = self.asked(strategy) or 0
        if asked > self.split.clients:
            raise ValueError(f"{told} asks {asked} clients a round; there are {self.split.clients}")

    def _require_asynchronous(self, strategy: StrategySpec) -> None:
        name = strategy.name
        if self.engine != "cohort":
            raise ValueError(
                f"{name} with engine={self.engine}: its clients arrive in virtual time, whose clock is in "
                "this process; use engine=cohort"
            )
        if strategy.over_selection > 1:
            raise ValueError(f"{name}: over_selection is of rounds, which it has not; set its concurrency")
        if strategy.hyperparameters["concurrency"] > self.split.clients:
            raise ValueError(
                f"{name}: concurrency={strategy.hyperparameters['concurrency']}: there are only "
                f"{self.split.clients} clients"
            )
        if self.privacy.kind != "none":
            raise ValueError(
                f"privacy.kind={self.privacy.kind} with {name}: what is spent is counted by rounds, and it "
                "has none"
            )
        if self.guard != GuardSpec():
            raise ValueError(
                f"guard with {name}: compares the replies of a round, and {name} takes each alone"
            )
        for other in (entry["name"] for entry in strategy.also):
            if {KEEPS, EXCHANGES} & set(declaration(other).flags):
                raise ValueError(
                    f"{name} with also={other}: what it keeps or exchanges is for rounds in which all start "
                    "from one model"
                )

    def asked(self, strategy: StrategySpec) -> int | None:
        """Return how many clients a strategy asks in a round; None for all."""
        if self.clients_per_round is None:
            return None
        return math.ceil(self.clients_per_round * strategy.over_selection)

    @model_validator(mode="after")
    def _fits_whose_data(self) -> Self:
        if self.app is not None:
            self._require_app(self.app)
        if self.split.at_nodes:
            self._require_own_data()
        elif self.nodes != NodesSpec():
            raise ValueError("nodes: is for split.kind=nodes")
        return self

    def _require_own_data(self) -> None:
        """Refuse what is done to data that are read and split in one place, where nodes have their own."""
        if self.task != _USUAL:
            raise ValueError(
                f"task={self.task}: nodes with data of their own agree on classes and scale, so that "
                f"split.kind=nodes is for task={_USUAL}"
            )
        usual = ExamplesSpec()
        for name in ("source", "owner", "held_out_fraction", "label_noise", "imbalance", "bag_size"):
            if getattr(self.data, name) != getattr(usual, name):
                raise ValueError(
                    f"data.{name}={getattr(self.data, name)}: with split.kind=nodes each node has its own "
                    "data, named in its own configuration; leave the field out"
                )
        if self.split.shifts_features:
            told = f"noise={self.split.noise:g}" if self.split.noise else f"shifts={list(self.split.shifts)}"
            raise ValueError(f"split.{told}: is not put on data of split.kind=nodes")
        if self.nodes.mean is not None and not self.data.standardise:
            raise ValueError("nodes.mean needs data.standardise=true")

    def _require_app(self, app: AppSpec) -> None:
        """Refuse what an app of others has of its own, or can't be asked for."""
        if self.engine == "cohort":
            raise ValueError(
                f"app={app.name}: engine=cohort trains our own clients; take engine=sequential or flower"
            )
        fields = type(self).model_fields
        for name in ("data", "model", "loss", "faults", "privacy"):
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name}: with app={app.name} the app has its own; leave the field out")
        for name, kept in (("split", "clients"), ("local", "lr")):
            usual = fields[name].get_default(call_default_factory=True)
            group = getattr(self, name)
            if group != usual.model_copy(update={kept: getattr(group, kept)}):
                raise ValueError(f"{name}: with app={app.name} only {name}.{kept} is asked for")
        for strategy in self.strategies:
            if POOLED in declaration(strategy.name).flags:
                raise ValueError(
                    f"strategies: {strategy.name} trains on what all clients have in one place, and only "
                    f"app={app.name} knows what that is; leave it out"
                )
            own = {"name": strategy.name, **strategy.hyperparameters}
            for entry in () if app.offered.uses_local_rule else (own, *strategy.also):
                _require_nothing_of_clients(entry, app.name)

    def told(self, strategy: StrategySpec, seed: int) -> TaskSpec:
        """Return what clients are told for one strategy and seed.

        Raises:
            UserError: What it begins from can't be read.
        """
        local = self.local if strategy.lr is None else self.local.model_copy(update={"lr": strategy.lr})
        from lossworks.training.weights.start import settled

        run = settled(self.run_spec(seed))
        return TaskSpec(
            seed=seed,
            run=run.model_dump(mode="json", include={"task", "batch_size", *_OF_RUNS}, exclude_unset=True),
            split=self.split,
            pooled=POOLED in declaration(strategy.name).flags,
            local=local,
            faults=self.faults,
            updates=self.updates,
        )


def _of_elements(entry: Declaration) -> bool:
    """Return whether a loss is the same whoever else is trained in the same process."""
    return not entry.roles and not {"whole-batch", "random", "own-outputs"} & set(entry.flags)


@cache
def federation_class(task: str) -> type[FederationSpec]:
    """Return the class of federations whose clients train a task, with its data and model.

    Raises:
        UserError: There is no such task.
    """
    if task == _USUAL:
        return FederationSpec
    own = task_class(task).spec.model_fields
    fields: dict[str, Any] = {n: (own[n].annotation, own[n]) for n in ("data", "model", "loss")}
    fields["task"] = (str, Field(task, description=FederationSpec.model_fields["task"].description))
    return create_model(f"{FederationSpec.__name__} of {task}", __base__=FederationSpec, **fields)


def _class_of(values: Mapping[str, Any], source: str) -> type[FederationSpec]:
    task = values.get("task", _USUAL)
    if not isinstance(task, str):
        raise UserError(f"{source}: task={task!r} must be one of {', '.join(task_slugs())}")
    try:
        return federation_class(task)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _require_nothing_of_clients(entry: Mapping[str, Any], app: str) -> None:
    """Refuse a strategy, as ``name`` and hyperparameters, that needs something of an app without our part."""
    name = entry["name"]
    flags = declaration(name).flags
    part = part_of(entry) if CLIENT_PART in flags else None
    if REPORTS not in flags and (part is None or part.idle):
        return
    without = (
        f", or {name} with {part.strength}=0, which leaves clients alone" if part and part.strength else ""
    )
    raise ValueError(
        f"strategies: {name} needs something of clients that app={app} leaves undone: let it train within "
        "`local_rule` and say so with uses_local_rule=True, or take a strategy that needs nothing, such as "
        f"fedavg{without}"
    )
