"""What the app of another package keeps in its context between rounds, for a run that goes on."""

import json
import re
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, MetricRecord
from torch import Tensor

from lossworks.tensors import load_tensors, metadata_of, write_tensors
from lossworks_federated.client.client_memory import KEPT, ROUND, Moment
from lossworks_federated.records import array_record, member_from

_OF_APP = "kept-round-of-app"
_APP = "app-"
"""What files begin with, before the round."""


def recall_app(context: Context, moment: Moment) -> None:
    """Put what an app of others kept in its context before a round back into it, and nothing else.

    What it kept in that round or later, or for another federation, is left.
    """
    known = context.state.config_records.get(_OF_APP)
    fits = known is not None and known["federation"] == moment.federation
    if known is not None and fits and int(known["round"]) < moment.server_round:  # type: ignore[arg-type]
        return
    for name in [name for name in context.state if not _is_ours(name)]:
        del context.state[name]
    folder = _folder(context, moment)
    versions = [] if folder is None or not folder.is_dir() else _versions(folder)
    usable = [file for number, file in versions if number < moment.server_round]
    if usable:
        _restore(context, usable[-1])


def keep_app(context: Context, moment: Moment) -> None:
    """Keep what an app of others has in its context after a round."""
    context.state[_OF_APP] = ConfigRecord({"round": moment.server_round, "federation": moment.federation})
    folder = _folder(context, moment)
    own = [name for name in context.state if not _is_ours(name)]
    if folder is None or not (own or (folder.is_dir() and _versions(folder))):
        return  # an app that never kept anything has no file; one that no longer does has an empty one
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for name in own:
        arrays = context.state.array_records.get(name)
        if arrays is None:
            kind = "metrics" if name in context.state.metric_records else "config"
            plain = {key: _as_json(value) for key, value in dict(context.state[name]).items()}
            records.append({"name": name, "kind": kind, "values": plain})
            continue
        places = {key: f"{len(tensors) + place}" for place, key in enumerate(arrays)}
        records.append({"name": name, "kind": "arrays", "values": places})
        tensors |= {places[key]: value for key, value in member_from(arrays).items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{_APP}{moment.server_round}.safetensors"
    write_tensors(file, tensors, records=json.dumps(records))
    _prune(folder, moment)


def _folder(context: Context, moment: Moment) -> Path | None:
    if moment.folder is None:
        return None
    # The name comes from the server: only its last part may name a folder here.
    return moment.folder / Path(moment.federation).name / str(context.node_config["partition-id"])


def _prune(folder: Path, moment: Moment) -> None:
    """Let go of versions that the server can't go on from: it may from its last state before this round."""
    safe = (moment.server_round - 1) // moment.checkpoint_every * moment.checkpoint_every
    for _, old in [version for version in _versions(folder) if version[0] <= safe][:-1]:
        old.unlink(missing_ok=True)


def _versions(folder: Path) -> list[tuple[int, Path]]:
    """Return the versions, by round."""
    found = [(re.fullmatch(rf"{_APP}(\d+)", file.stem), file) for file in folder.glob("*.safetensors")]
    return sorted((int(match[1]), file) for match, file in found if match)


def _is_ours(name: str) -> bool:
    """Return whether a record of a context is ours, and not the app's."""
    return name in (ROUND, _OF_APP) or name.startswith(KEPT)


def _restore(context: Context, file: Path) -> None:
    """Put the records of a file into a context."""
    tensors = load_tensors(file)
    for record in json.loads(metadata_of(file)["records"]):
        name, values = record["name"], record["values"]
        if record["kind"] == "arrays":
            context.state[name] = array_record({key: tensors[place] for key, place in values.items()})
            continue
        plain = {key: _from_json(value) for key, value in values.items()}
        context.state[name] = MetricRecord(plain) if record["kind"] == "metrics" else ConfigRecord(plain)


def _as_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    return {"base64": b64encode(value).decode()} if isinstance(value, bytes) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one) for one in value]
    return b64decode(value["base64"]) if isinstance(value, dict) else value
