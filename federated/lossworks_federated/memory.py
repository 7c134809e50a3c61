"""What a client keeps between rounds: in Flower's context, and in a folder of its own if it has one.

The context lives as long as the client's node. The folder, named by the run configuration's
``state-folder``, outlives it, so that a federation that was stopped goes on with the clients as they were
after the round it goes on from.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from flwr.app import ConfigRecord, Context

from lossworks.cohort import Member
from lossworks.errors import RunError
from lossworks_federated.records import array_record, flattened, grouped, member_from

_KEPT = "kept."
_ROUND = "kept-round"
_VERSIONS = 2  # the newest of an unfinished round, and the one before it


def recall(context: Context, slugs: Iterable[str], server_round: int) -> dict[str, Member]:
    """Return what a client kept before a round, by slug of the part that it is for.

    Args:
        context: The client's.
        slugs: Of the parts.
        server_round: The round about to start; what was kept in it or later belongs to an attempt that was
            stopped, and is left.
    """
    known = context.state.config_records.get(_ROUND)
    if known is None or int(known["round"]) >= server_round:  # type: ignore[arg-type]
        _read(context, server_round)
    records = context.state.array_records
    return {slug: member_from(records[_KEPT + slug]) for slug in slugs if _KEPT + slug in records}


def keep(context: Context, kept: dict[str, Member], server_round: int, *, local: bool) -> None:
    """Keep what parts have for a client's next round."""
    for slug, member in kept.items():
        context.state[_KEPT + slug] = array_record(member, local=local)
    context.state[_ROUND] = ConfigRecord({"round": server_round})
    folder = _folder(context)
    if folder is not None and kept:
        _write(folder, kept, server_round)


def _folder(context: Context) -> Path | None:
    named = context.run_config.get("state-folder")
    return Path(str(named)) / str(context.node_config["partition-id"]) if named else None


def _write(folder: Path, kept: dict[str, Member], server_round: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{server_round}.safetensors", flattened(kept))
    for _, old in _versions(folder)[:-_VERSIONS]:
        old.unlink(missing_ok=True)


def _read(context: Context, server_round: int) -> None:
    """Put the newest version from before a round into the context, or nothing if there is none."""
    for name in [name for name in context.state if name.startswith(_KEPT)]:
        del context.state[name]
    context.state[_ROUND] = ConfigRecord({"round": -1})
    folder = _folder(context)
    versions = [] if folder is None or not folder.is_dir() else _versions(folder)
    usable = [(number, file) for number, file in versions if number < server_round]
    if not usable:
        return
    number, file = usable[-1]
    for slug, member in grouped(load_tensors(file)).items():
        context.state[_KEPT + slug] = array_record(member)
    context.state[_ROUND] = ConfigRecord({"round": number})


def _versions(folder: Path) -> list[tuple[int, Path]]:
    files = [file for file in folder.glob("*.safetensors") if re.fullmatch(r"\d+", file.stem)]
    return sorted((int(file.stem), file) for file in files)


def write_tensors(file: Path, tensors: Member, **metadata: str) -> None:
    """Write tensors to a file in one piece, with their order and further texts."""
    from safetensors.torch import save_file

    partial = file.with_suffix(".partial")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, partial, metadata={"order": json.dumps(list(whole)), **metadata})
    partial.replace(file)


def load_tensors(file: Path) -> Member:
    """Return the tensors of a file in the order in which they were saved.

    Raises:
        RunError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as found:
            order = json.loads((found.metadata() or {})["order"])
            return {name: found.get_tensor(name) for name in order}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise RunError(f"{file}: is damaged: {error}") from None
