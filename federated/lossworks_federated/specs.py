"""The parts of a federation's spec."""

from typing import ClassVar, Literal

from pydantic import Field

from lossworks.specs import Spec


class SplitSpec(Spec):
    """How examples are spread over clients; ``split=shards`` is short for ``split.kind=shards``."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Literal["iid", "dirichlet", "shards", "quantity"] = Field(
        "dirichlet",
        description="iid; dirichlet (each class is cut by its own draw of shares); shards (examples sorted "
        "by label are cut into equal shards, so many a client); quantity (sizes are drawn, labels alike)",
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
