"""The spec of a federation, and the part of it that clients are told."""

from typing import Any, ClassVar, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from lossworks.specs import ClassifierModelSpec, ExamplesSpec, LossSpec, Spec, TrackingSpec


class SplitSpec(Spec):
    """How examples are spread over clients; ``split=shards`` is short for ``split.kind=shards``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["iid", "dirichlet", "shards", "quantity", "natural"] = Field(
        "dirichlet",
        description="iid; dirichlet (each class is cut by its own draw of shares); shards (examples sorted "
        "by label are cut into equal shards, so many a client); quantity (sizes are drawn, labels alike); "
        "natural (by data.owner; where owners are more than clients, several share one)",
    )
    clients: int = Field(20, ge=1, le=1_000_000, description="clients, M")
    alpha: float = Field(
        0.5, gt=0.0, le=1e6, description="of the Dirichlet draws: 100 near iid, 0.5 usual, 0.1 severe"
    )
    shards_per_client: int = Field(2, ge=1, le=1000, description="shards each client is given")
    min_size: int = Field(
        4, ge=2, le=10**6, description="examples a client has at least; taken from the largest, and counted"
    )
    test_fraction: float = Field(
        0.2, ge=0.0, lt=1.0, description="share of each client's examples that it keeps for its own test"
    )
    noise: float = Field(
        0.0, ge=0.0, description="feature skew: client i's inputs get Gaussian noise of variance noise·i/M"
    )


class LocalSpec(Spec):
    """What a client does in a round; the optimiser starts anew each time."""

    epochs: int = Field(5, ge=1, le=1000, description="passes over the client's examples, E")
    batch_size: int = Field(16, ge=1, le=2**20, description="examples a step, B")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw")
    lr: float = Field(0.1, gt=0.0, le=10.0, description="learning rate of clients")
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="of sgd, within a round")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="of the optimiser")


class FaultSpec(Spec):
    """Faults put into clients' replies, to see what a federation makes of them; shares of replies."""

    drop_out: float = Field(0.0, ge=0.0, le=1.0, description="share of clients that fail in a round")
    straggle: float = Field(0.0, ge=0.0, le=1.0, description="share that answer after the deadline")
    nan: float = Field(0.0, ge=0.0, le=1.0, description="share that return NaN")
    shape: float = Field(0.0, ge=0.0, le=1.0, description="share that return an array of a wrong shape")
    empty: float = Field(0.0, ge=0.0, le=1.0, description="share that return no arrays")
    sign_flip: float = Field(0.0, ge=0.0, le=1.0, description="share that return w⁰ − (w − w⁰)")
    scale: float = Field(0.0, ge=0.0, le=1.0, description="share that return w⁰ + 100·(w − w⁰)")
    nan_clients: tuple[int, ...] = Field((), description="clients, by number, that always return NaN")
    lying_clients: tuple[int, ...] = Field((), description="clients that always return w⁰ − (w − w⁰)")


class GuardSpec(Spec):
    """Which replies a server refuses besides errors, NaN, wrong shapes and empty ones."""

    largest_norm: float | None = Field(
        None,
        gt=1.0,
        description="refuse an update longer than so many times the median; null for not",
    )
    least_cosine: float | None = Field(
        None,
        ge=-1.0,
        lt=1.0,
        description="refuse an update whose cosine with the round's coordinate-wise median is below; null "
        "for not. With skewed labels honest cosines come near 0",
    )


class PrivacySpec(Spec):
    """Flower's client-side privacy; ``privacy=local`` is short for ``privacy.kind=local``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["none", "local", "central", "secagg"] = Field(
        "none",
        description="none; local (each client clips its update and adds noise for (ε, δ)); central (clients "
        "clip, the server adds noise); secagg is refused with the reason",
    )
    clipping_norm: float = Field(1.0, gt=0.0, description="largest norm of a client's update")
    epsilon: float = Field(10.0, gt=0.0, description="ε of kind=local, for one round")
    delta: float = Field(1e-5, gt=0.0, lt=1.0, description="δ of kind=local, for one round")
    noise_multiplier: float = Field(
        0.1, ge=0.0, description="of kind=central: deviation of the noise over clipping_norm / clients"
    )


class MeasureSpec(Spec):
    """When and on what the global model is measured."""

    every: int = Field(1, ge=1, description="rounds between measurements; the last round is always measured")
    clients: int | None = Field(
        None, ge=1, description="clients that test on their own examples each time; all if unset"
    )
    terms: bool = Field(
        True, description="measure local, distribution shift and aggregation loss of every measured round"
    )
    target: float | None = Field(
        None, gt=0.0, le=1.0, description="held-out accuracy whose first round is reported; null for none"
    )


class StrategySpec(Spec):
    """A strategy with its hyperparameters, which are fields beside ``name``: ``{name: fedprox, mu: 0.1}``.

    ``fedavg`` alone is short for ``{name: fedavg}``.
    """

    model_config = ConfigDict(extra="allow")
    shorthand: ClassVar[str | None] = "name"
    open_to: ClassVar[str | None] = "name"

    name: str = Field("fedavg", description="slug; `lossworks federate --strategies` lists them")
    label: str | None = Field(
        None, min_length=1, max_length=60, description="name in tables and pictures; default: what is set"
    )
    lr: float | None = Field(
        None, gt=0.0, le=10.0, description="learning rate of clients in place of local.lr"
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
        from lossworks_federated.strategies.catalogue import check_settings

        usual = check_settings(self.name, {})
        variant = f" ({self.hyperparameters['variant']})" if "variant" in usual else ""
        set_here = [
            f"{name}={value}"
            for name, value in self.hyperparameters.items()
            if value != usual[name] and name != "variant"
        ]
        set_here += [f"lr={self.lr:g}"] if self.lr is not None else []
        others = "".join(f" + {entry['name']}" for entry in self.also)
        return " ".join([self.name + variant + others, *set_here])

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Check the hyperparameters and give the others their defaults, which are stored with a run."""
        from lossworks_federated.strategies.catalogue import check_also, check_settings

        resolved = check_settings(self.name, self.model_extra or {})
        object.__setattr__(self, "__pydantic_extra__", resolved)
        object.__setattr__(self, "also", tuple(check_also(self.name, entry) for entry in self.also))
        return self

    @model_serializer(mode="wrap")
    def _without_unset(self, plain: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        kept = self.model_fields_set if info.exclude_unset else values.keys()
        return {name: value for name, value in values.items() if name in kept}


class TaskSpec(Spec):
    """What clients are told: data, split, model, loss and local training of one seed."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of data, split, parameters, orders and faults")
    data: ExamplesSpec = ExamplesSpec()
    split: SplitSpec = SplitSpec()
    model: ClassifierModelSpec = ClassifierModelSpec()
    loss: LossSpec = LossSpec()
    local: LocalSpec = LocalSpec()
    faults: FaultSpec = FaultSpec()


class FederationSpec(Spec):
    """A comparison of strategies over seeds, or one strategy with one seed."""

    command: ClassVar[str | None] = "federate"

    kind: Literal["federation"] = Field("federation", description="what the spec describes")
    name: str = Field("federate", min_length=1, max_length=100, description="name of the run in MLflow")
    engine: Literal["cohort", "flower"] = Field(
        "cohort",
        description="cohort (a round's clients trained at once in this process) or flower (Flower's "
        "simulation over Ray)",
    )
    strategies: tuple[StrategySpec, ...] = Field(
        default_factory=lambda: (StrategySpec(),),  # not now: the strategies import this module
        min_length=1,
        description="strategies to compare: slugs or mappings",
    )
    seeds: tuple[int, ...] = Field(
        (0,), min_length=1, description="seeds; each has its own split, initial parameters and orders"
    )
    rounds: int = Field(30, ge=1, le=1_000_000, description="rounds of training")
    clients_per_round: int | None = Field(None, ge=1, description="clients drawn each round; all if unset")
    min_replies: int = Field(1, ge=1, description="usable replies below which a round, and the run, fails")
    deadline_s: float | None = Field(
        None, gt=0.0, description="seconds that a round waits for replies; null for Flower's hour"
    )
    checkpoint_every: int = Field(1, ge=1, description="rounds between saved states")
    storage: str | None = Field(
        None, description="absolute folder of runs; default: runs/ in the home folder"
    )
    data: ExamplesSpec = ExamplesSpec()
    split: SplitSpec = SplitSpec()
    model: ClassifierModelSpec = ClassifierModelSpec(width=64)
    loss: LossSpec = LossSpec()
    local: LocalSpec = LocalSpec()
    faults: FaultSpec = FaultSpec()
    guard: GuardSpec = GuardSpec()
    privacy: PrivacySpec = PrivacySpec()
    measure: MeasureSpec = MeasureSpec()
    tracking: TrackingSpec = TrackingSpec()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from lossworks_federated.privacy import require_compatible

        self.loss.require(lambda entry: entry.kind == "row", "the clients of a federation")
        if (self.split.kind == "natural") != (self.data.owner is not None):
            raise ValueError("split.kind=natural and data.owner need each other")
        if self.model.dropout:
            raise ValueError(
                f"model.dropout={self.model.dropout}: must be 0, since what is dropped would depend on who "
                "else is trained in the same process"
            )
        if self.min_replies > min(self.clients_per_round or self.split.clients, self.split.clients):
            raise ValueError(f"min_replies={self.min_replies}: more than the clients of a round")
        if self.faults.straggle and self.engine == "flower" and self.deadline_s is None:
            raise ValueError("faults.straggle with engine=flower needs a deadline_s that they outlast")
        titles = [strategy.title for strategy in self.strategies]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f"strategies: {title} is there twice; set label to tell them apart")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)}: the same seed twice gives the same result twice")
        for strategy in self.strategies:
            require_compatible(strategy, self.privacy)
            names = [strategy.name, *(entry["name"] for entry in strategy.also)]
            if "scaffold" in names and (self.local.optimizer != "sgd" or self.local.momentum):
                raise ValueError("scaffold needs local.optimizer=sgd and local.momentum=0")
        return self

    def task(self, strategy: StrategySpec, seed: int) -> TaskSpec:
        """Return what clients are told for one strategy and seed."""
        local = self.local if strategy.lr is None else self.local.model_copy(update={"lr": strategy.lr})
        return TaskSpec(
            seed=seed,
            data=self.data,
            split=self.split,
            model=self.model,
            loss=self.loss,
            local=local,
            faults=self.faults,
        )
