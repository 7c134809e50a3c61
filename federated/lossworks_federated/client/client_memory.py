"""What a client keeps between rounds: in a store on disk if there is one, or else in Flower's context.

The context lives as long as the client's node. The store outlives it, so that a federation that was stopped
goes on with the clients as they were after the round it goes on from; and what all of them keep need not fit
into memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks_federated.client.client_store import ClientStore
from lossworks_federated.records import array_record, member_from

KEPT, ROUND = "kept.", "kept-round"
"""Records in a context: what parts keep, by slug behind the first, and since which round."""
_STORE = "clients.sqlite"


@dataclass(frozen=True)
class Moment:
    """When something is recalled or kept.

    Attributes:
        federation: Name of the run; what was kept for another is not recalled.
        server_round: The round.
        checkpoint_every: Rounds between the states that the server may go on from.
        folder: Where clients of this process keep things beyond its end; None for nowhere.
    """

    federation: str
    server_round: int
    checkpoint_every: int = 1
    folder: Path | None = None

    @property
    def store(self) -> ClientStore | None:
        """Where clients keep things beyond the end of this process, if anywhere."""
        if self.folder is None:
            return None
        # The name comes from the server: only its last part may name a folder here.
        return ClientStore(self.folder / Path(self.federation).name / _STORE)


def moment_of(config: Mapping[str, Any], server_round: int, folder: Path | None) -> Moment:
    """Return the moment that an instruction's configuration tells, in a client's folder."""
    every = int(config.get("checkpoint-every", 1))
    return Moment(str(config.get("federation", "")), server_round, every, folder)


def recall(contexts: Sequence[Context], slugs: Iterable[str], moment: Moment) -> list[dict[str, Member]]:
    """Return what each client kept before a round, by slug of the part that it is for.

    What was kept in that round or later belongs to an attempt that was stopped, and is left.

    Raises:
        RunError: The store that all clients share is gone after the first round, or damaged.
    """
    slugs = list(slugs)
    if moment.store is None:
        return [_recalled(context, slugs, moment) for context in contexts]
    # A node with a folder of its own may be asked late for the first time.
    shared = any("state-folder" not in context.node_config for context in contexts)
    if shared and moment.server_round > 1 and not moment.store.exists():
        raise RunError(
            f"{moment.store.path} is gone: it holds what clients have kept for {', '.join(slugs)} before "
            f"round {moment.server_round}, and without it they would begin anew; put it back, or start "
            "another run"
        )
    found = moment.store.read([_partition(context) for context in contexts], moment.server_round)
    return [{slug: kept[slug] for slug in slugs if slug in kept} for kept in found]


def keep(
    contexts: Sequence[Context], kept: Sequence[dict[str, Member]], moment: Moment, *, local: bool
) -> None:
    """Keep what parts have for each client's next round.

    Args:
        contexts: Of the clients.
        kept: Of each, tensors by slug.
        moment: When.
        local: Whether the contexts stay in this process.

    Raises:
        RunError: The store can't be written.
    """
    if moment.store is not None:
        # The server may go on from the last state it saved before this round.
        safe = (moment.server_round - 1) // moment.checkpoint_every * moment.checkpoint_every
        pairs = zip(map(_partition, contexts), kept, strict=True)
        moment.store.write(pairs, moment.server_round, safe=safe)
        return
    for context, groups in zip(contexts, kept, strict=True):
        for slug, member in groups.items():
            # Cloned where it stays in memory, since a view would hold the whole stack.
            own = {name: value.clone() for name, value in member.items()}
            context.state[KEPT + slug] = array_record(own, local=local)
        context.state[ROUND] = ConfigRecord({"round": moment.server_round, "federation": moment.federation})


def _partition(context: Context) -> int:
    return int(context.node_config["partition-id"])


def _recalled(context: Context, slugs: Sequence[str], moment: Moment) -> dict[str, Member]:
    known = context.state.config_records.get(ROUND)
    fits = known is not None and known["federation"] == moment.federation
    if known is None or not fits or int(known["round"]) >= moment.server_round:  # type: ignore[arg-type]
        for name in [name for name in context.state if name.startswith(KEPT)]:
            del context.state[name]
        return {}
    records = context.state.array_records
    return {slug: member_from(records[KEPT + slug]) for slug in slugs if KEPT + slug in records}
