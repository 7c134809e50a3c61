"""Parts of a federation's spec, and the part of it that clients are told."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lossworks.specs import RunSpec, Spec
from lossworks.specs.files import named_files
from lossworks.tasks import parse_train_spec

ShiftKind = Literal["none", "contrast", "noise", "blur", "resolution"]


class SplitSpec(Spec):
    """How examples are spread over clients; ``split=shards`` is short for ``split.kind=shards``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["iid", "dirichlet", "shards", "quantity", "natural", "nodes"] = Field(
        "dirichlet",
        description="iid; dirichlet (each class is cut by its own draw of shares); shards (examples sorted "
        "by label are cut into equal shards, so many a client); quantity (sizes are drawn, labels alike); "
        "natural (each client is an owner of data.owner: those with fewer examples than min_size are left "
        "out and counted, and of more owners than clients so many are drawn); nodes (each node of a deployed "
        "federation has its own data, which its own configuration names)",
    )
    clients: int = Field(20, ge=1, le=1_000_000, description="clients, M")
    alpha: float = Field(
        0.5, gt=0.0, le=1e6, description="of the Dirichlet draws: 100 near iid, 0.5 usual, 0.1 severe"
    )
    shards_per_client: int = Field(2, ge=1, le=1000, description="shards each client is given")
    min_size: int = Field(
        4,
        ge=2,
        le=10**6,
        description="examples a client has at least; taken from the largest, and counted, or with natural "
        "those of the owners that take part",
    )
    test_fraction: float = Field(
        0.2, ge=0.0, lt=1.0, description="share of each client's examples that it keeps for its own test"
    )
    noise: float = Field(
        0.0, ge=0.0, description="feature skew: client i's inputs get Gaussian noise of variance noise·i/M"
    )

    shifts: tuple[ShiftKind, ...] = Field(
        (),
        description="feature skew of images: client i sees its own, and its tests, in the i-th way of these, "
        "in turn: none, contrast, noise, blur, resolution; held-out ones are seen in all of them",
    )
    shift_strength: float = Field(1.0, gt=0.0, le=10.0, description="how much shifts change images")

    @property
    def shifts_features(self) -> bool:
        """Whether clients see inputs in ways of their own."""
        return bool(self.noise or self.shifts)

    @property
    def at_nodes(self) -> bool:
        """Whether each node has its own data, which nobody else reads."""
        return self.kind == "nodes"


class NodesSpec(Spec):
    """What is given for ``split.kind=nodes`` instead of being asked of the nodes."""

    mean: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="means of the features or channels; null for those of all nodes' sums",
    )
    deviation: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(
        None, min_length=1, description="their deviations, with mean"
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("mean and deviation are given together, or neither")
        if self.mean is not None and self.deviation is not None and len(self.mean) != len(self.deviation):
            raise ValueError(f"{len(self.mean)} means and {len(self.deviation)} deviations: must be as many")
        return self


class LocalSpec(Spec):
    """What a client does in a round; the optimiser starts anew each time."""

    epochs: int = Field(5, ge=1, le=1000, description="passes over the client's examples, E")
    batch_size: int = Field(16, ge=1, le=2**20, description="examples a step, B")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw")
    lr: float = Field(0.1, gt=0.0, le=10.0, description="learning rate of clients")
    momentum: float = Field(0.0, ge=0.0, lt=1.0, description="of sgd, within a round")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="of the optimiser")


FAULTS = ("drop_out", "straggle", "nan", "shape", "empty", "sign_flip", "scale")
"""What can go wrong with a reply, in the order in which it is drawn."""


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
    sign_flip_clients: tuple[int, ...] = Field((), description="clients that always return w⁰ − (w − w⁰)")

    @model_validator(mode="after")
    def _leaves_some(self) -> Self:
        shares = {name: getattr(self, name) for name in FAULTS}
        total = sum(shares.values())
        if total > 1 + 1e-9:
            some = ", ".join(f"{name}={share:g}" for name, share in shares.items() if share)
            raise ValueError(f"{some} add up to {total:g}; a reply has one fault at most, so 1 is the most")
        return self

    def require_clients(self, clients: int) -> None:
        """Refuse faults of clients that there are not.

        Raises:
            ValueError: Naming the field.
        """
        for name in ("nan_clients", "sign_flip_clients"):
            for client in getattr(self, name):
                if not 0 <= client < clients:
                    raise ValueError(f"faults.{name}: there is no client {client}, of 0 to {clients - 1}")


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
        "for not. With skewed labels the cosines of all clients come near 0",
    )


class PrivacySpec(Spec):
    """Differential privacy by Flower; ``privacy=local`` is short for ``privacy.kind=local``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["none", "local", "central", "secagg"] = Field(
        "none",
        description="none; local (each client clips its update and adds noise for (ε, δ)); central (clients "
        "clip and count alike, the server adds noise); secagg is refused with the reason",
    )
    clipping_norm: float = Field(1.0, gt=0.0, description="largest norm of a client's update")
    epsilon: float = Field(10.0, gt=0.0, description="ε of kind=local, for one round")
    delta: float = Field(
        1e-5, gt=0.0, lt=1.0, description="δ of all rounds together, and of one round of kind=local"
    )
    noise_multiplier: float = Field(
        0.1, ge=0.0, description="of kind=central: deviation of the noise over clipping_norm / clients"
    )
    budget: float | None = Field(
        None,
        gt=0.0,
        description="ε at delta that all rounds together may spend; rounds that would spend more are refused "
        "before the first; null for any",
    )

    @property
    def noisy(self) -> bool:
        """Whether there is noise, without which there is no ε."""
        return self.kind == "local" or (self.kind == "central" and self.noise_multiplier > 0)

    @model_validator(mode="after")
    def _has_a_price(self) -> Self:
        if self.budget is not None and not self.noisy:
            raise ValueError(
                f"budget={self.budget:g}: needs kind=local, or kind=central with a noise_multiplier above 0; "
                "without noise nothing is private"
            )
        return self


class UpdatesSpec(Spec):
    """How clients send what they learnt; ``updates=top-k`` is short for ``updates.kind=top-k``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["none", "top-k", "random-mask", "quantised"] = Field(
        "none",
        description="none (parameters as they are); top-k (the entries of the update w − w⁰ that are largest "
        "in magnitude); random-mask (entries drawn by a seed, which is sent in place of where they are); "
        "quantised (each entry of the update rounded to few bits, at random, so that its mean is right)",
    )
    share: float = Field(
        0.01, gt=0.0, le=1.0, description="of top-k and random-mask: share of the entries that is sent"
    )
    bits: int = Field(
        8, ge=1, le=32, description="of quantised: bits of an entry, 1 to 16; 32 sends them as they are"
    )
    error_feedback: bool | None = Field(
        None,
        description="whether a client adds what it has not sent to its next update; unset: top-k does",
    )

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        if 16 < self.bits < 32:
            raise ValueError(f"bits={self.bits}: must be 1 to 16, or 32, which sends entries as they are")
        if self.error_feedback and self.kind == "none":
            raise ValueError("error_feedback=true: needs a kind that leaves something out")
        if self.error_feedback and self.kind == "quantised":
            raise ValueError(
                "error_feedback=true with kind=quantised: rounding that is right in the mean has no lasting "
                "error, and with few bits it may be longer than the update, so that what is fed back grows"
            )
        return self

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what they have not sent."""
        return self.kind == "top-k" if self.error_feedback is None else self.error_feedback

    @property
    def sparse(self) -> bool:
        """Whether most entries of what the server reads may be 0."""
        return self.kind in ("top-k", "random-mask")

    def require_fit(
        self, strategy: str, *, whole_updates: bool, guard: "GuardSpec", privacy: "PrivacySpec"
    ) -> None:
        """Refuse what compressed updates would break.

        Args:
            strategy: The strategy's slug.
            whole_updates: Whether what its server does with updates holds for whole ones only.
            guard: Which replies are refused.
            privacy: The federation's.

        Raises:
            ValueError: With the reason.
        """
        if self.kind == "none":
            return
        if whole_updates:
            raise ValueError(
                f"updates.kind={self.kind} with {strategy}: a mean of compressed updates is near that of "
                f"whole ones, but {strategy} compares clients' updates with each other or sums them as "
                "clients do, too, which compressed ones would bring apart"
            )
        if privacy.kind != "none":
            raise ValueError(
                f"updates.kind={self.kind} with privacy.kind={privacy.kind}: updates must be clipped and "
                "blurred before they are compressed, and Flower's mods do it to what clients send in the end"
            )
        if self.sparse and guard.least_cosine is not None:
            raise ValueError(
                f"updates.kind={self.kind} with guard.least_cosine={guard.least_cosine:g}: the median of "
                "entries that most clients leave out is 0, which has no direction"
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
    personalise: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="at the end each client, or so many as clients says, fine-tunes the global model for so "
        "many epochs of its own examples, and tests both on its own tests; null for not",
    )
    target: float | None = Field(
        None, gt=0.0, le=1.0, description="held-out accuracy whose first round is reported; null for none"
    )


class TaskSpec(Spec):
    """What clients are told: what is trained, on which data, their split, and local training of one seed."""

    seed: int = Field(0, ge=0, lt=2**32, description="seed of data, split, parameters, orders and faults")
    run: dict[str, Any] = Field(
        default_factory=dict, description="training of one process: task, data, model, loss and so on"
    )
    split: SplitSpec = SplitSpec()
    pooled: bool = Field(False, description="whether the first client trains on what all of them have")
    local: LocalSpec = LocalSpec()
    faults: FaultSpec = FaultSpec()
    updates: UpdatesSpec = UpdatesSpec()

    def run_spec(self) -> RunSpec:
        """Return the training of one process that a client's is like.

        Raises:
            UserError: It doesn't fit what is installed here.
        """
        return parse_train_spec({**self.run, "seed": self.seed}, source="the task that clients are told")

    def files_named(self) -> list[str]:
        """Return which fields name files of the machine that reads them, as ``data.source=csv:PATH``."""
        start = self.run.get("start")
        return [str(file) for file in named_files(self.run)] + ([f"start={start}"] if start else [])
