"""What a client keeps between rounds: in Flower's context, and in a folder of its own if it has one.

The context lives as long as the client's node. The folder outlives it, so that a federation that was stopped
goes on with the clients as they were after the round it goes on from.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context

from lossworks.cohort import Member
from lossworks.tensors import load_tensors, write_tensors
from lossworks_federated.records import array_record, flattened, grouped, member_from

_KEPT = "kept."
_ROUND = "kept-round"


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


def moment_of(config: Mapping[str, Any], server_round: int, folder: Path | None) -> Moment:
    """Return the moment that an instruction's configuration tells, in a client's folder."""
    every = int(config.get("checkpoint-every", 1))
    return Moment(str(config.get("federation", "")), server_round, every, folder)


def recall(context: Context, slugs: Iterable[str], moment: Moment) -> dict[str, Member]:
    """Return what a client kept before a round, by slug of the part that it is for.

    What was kept in that round or later belongs to an attempt that was stopped, and is left.
    """
    known = context.state.config_records.get(_ROUND)
    fits = known is not None and known["federation"] == moment.federation
    if known is None or not fits or int(known["round"]) >= moment.server_round:  # type: ignore[arg-type]
        _read(context, moment)
    records = context.state.array_records
    return {slug: member_from(records[_KEPT + slug]) for slug in slugs if _KEPT + slug in records}


def keep(context: Context, kept: dict[str, Member], moment: Moment, *, local: bool) -> None:
    """Keep what parts have for a client's next round."""
    for slug, member in kept.items():
        context.state[_KEPT + slug] = array_record(member, local=local)
    _mark(context, moment, moment.server_round)
    folder = _folder(context, moment)
    if folder is not None and kept:
        _write(folder, kept, moment)


def bytes_kept(context: Context) -> int:
    """Return the size of what a client keeps in memory."""
    return sum(
        value.numel() * value.element_size()
        for name, record in context.state.array_records.items()
        if name.startswith(_KEPT)
        for value in member_from(record).values()
    )


def _mark(context: Context, moment: Moment, server_round: int) -> None:
    context.state[_ROUND] = ConfigRecord({"round": server_round, "federation": moment.federation})


def _folder(context: Context, moment: Moment) -> Path | None:
    if moment.folder is None:
        return None
    # The name comes from the server: only its last part may name a folder here.
    return moment.folder / Path(moment.federation).name / str(context.node_config["partition-id"])


def _write(folder: Path, kept: dict[str, Member], moment: Moment) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{moment.server_round}.safetensors", flattened(kept))
    # The server may go on from the last state it saved before this round.
    safe = (moment.server_round - 1) // moment.checkpoint_every * moment.checkpoint_every
    for _, old in [version for version in _versions(folder) if version[0] <= safe][:-1]:
        old.unlink(missing_ok=True)


def _read(context: Context, moment: Moment) -> None:
    """Put the newest version from before a round into the context, or nothing if there is none."""
    for name in [name for name in context.state if name.startswith(_KEPT)]:
        del context.state[name]
    _mark(context, moment, -1)
    folder = _folder(context, moment)
    versions = [] if folder is None or not folder.is_dir() else _versions(folder)
    usable = [(number, file) for number, file in versions if number < moment.server_round]
    if not usable:
        return
    number, file = usable[-1]
    for slug, member in grouped(load_tensors(file)).items():
        context.state[_KEPT + slug] = array_record(member)
    _mark(context, moment, number)


def _versions(folder: Path) -> list[tuple[int, Path]]:
    files = [file for file in folder.glob("*.safetensors") if re.fullmatch(r"\d+", file.stem)]
    return sorted((int(file.stem), file) for file in files)
