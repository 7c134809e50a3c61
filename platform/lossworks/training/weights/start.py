"""Trained weights to begin from, or to be a companion: of a run's checkpoint, or of an exported folder."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from lossworks.catalogue.registry import create, declarations
from lossworks.data.learnt import Learnt
from lossworks.errors import UserError
from lossworks.models import HeadedModel
from lossworks.models.folders import CONFIG, WEIGHTS, read_config, read_tensors
from lossworks.models.pretrained import CONFIG_BESIDE_TRANSFORMERS, TOKENIZER
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import CheckpointStore, tensors_in
from lossworks.training.checkpoints.manifest import Checkpoint, find_damage
from lossworks.training.optimizer import OBJECTIVE
from lossworks.training.weights.adapters import merged

ATTACHED = f"{OBJECTIVE}."
"""Prefix of what belongs to the losses and not to the model."""


_CHECKPOINT = "hf:"  # of transformers, which brings its own configuration and tokenizer


@dataclass(frozen=True, eq=False)
class TrainedWeights:
    """Weights with what they are weights of.

    Attributes:
        source: What messages call it.
        model: The model's part of the spec they were trained with, as plain data.
        read: Reads the tensors, which may be gigabytes that whoever asks for the model alone never needs.
        task: Slug of the task, where that is known.
        learnt: What its data have taught besides; None where that was not kept.
    """

    source: str
    model: dict[str, Any]
    read: Callable[[], dict[str, Tensor]]
    task: str | None = None
    learnt: Learnt | None = None

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Tensors by name, without those of losses; they are read at the first call."""
        return self.read()


def choose_checkpoint(folder: RunFolder, *, best: bool = True) -> Checkpoint:
    """Return a run's whole checkpoint with the least held-out loss, or the newest.

    Of a run with a method that comes to its end by a schedule it is always the newest.

    Raises:
        UserError: There is none.
    """
    spec = folder.spec()
    store = CheckpointStore(folder.checkpoints, keep=spec.checkpoint.keep)
    chosen = store.best() if best and not any(method.newest for method in _methods(spec)) else None
    if chosen is None or find_damage(chosen.folder) is not None:
        chosen, complaints = store.newest()
        if chosen is None:
            why = f": {'; '.join(complaints)}" if complaints else " yet"
            raise UserError(f"run {folder.run_id}: has no whole checkpoint{why}")
    return chosen


def _methods(spec: RunSpec) -> list[Method]:
    return [create(one.name, **one.hyperparameters) for one in spec.methods]


def run_weights(folder: RunFolder, checkpoint: Checkpoint) -> tuple[RunSpec, dict[str, Tensor]]:
    """Return a run's spec and its model's tensors in a checkpoint, as they are used.

    Losses are left out, adapters are merged, and the run's methods say what they have made of the model.

    Raises:
        UserError: A method says that the checkpoint is of no use yet.
    """
    spec = folder.spec()
    state = tensors_in(checkpoint.folder, "model.")
    own = {name: value for name, value in state.items() if not name.startswith(ATTACHED)}
    found: Mapping[str, Tensor] = merged(own, spec.lora)
    for method in _methods(spec):
        kept = tensors_in(checkpoint.folder, f"methods.{method.slug}.")
        spec, found = method.exported(spec, found, kept)
    return spec, dict(found)


def trained_weights(name: str, field: str) -> TrainedWeights:
    """Return the weights of a run or of an exported folder.

    Args:
        name: Id, beginning of an id, name or folder of a run; or a folder of ``lossworks export``.
        field: Of the spec, for messages.

    Raises:
        UserError: There is nothing of that name, or it can't be read.
    """
    path, source = Path(name).expanduser(), f"{field}={name}"
    if (path / WEIGHTS).is_file():
        config = read_config(path / CONFIG)
        read = functools.partial(read_tensors, path / WEIGHTS)
        return TrainedWeights(source, dict(config.get("model") or {}), read, learnt=learnt_in(path))
    folder = _run_of(name, field)
    spec, read = folder.spec(), functools.partial(_tensors_of, folder)
    if any(type(method).exported is not Method.exported for method in _methods(spec)):
        # What such a method has made of the model, only the tensors say.
        spec, state = run_weights(folder, choose_checkpoint(folder))
        read = functools.partial(dict, state)
    model = spec.model_dump(mode="json").get("model", {})
    return TrainedWeights(source, model, read, task_of(spec).slug, learnt_by(folder))


def _tensors_of(folder: RunFolder) -> dict[str, Tensor]:
    return run_weights(folder, choose_checkpoint(folder))[1]


def learnt_of_start(spec: RunSpec) -> Learnt | None:
    """Return what the model that a run begins from has learnt of its data; None where it begins anew.

    Raises:
        UserError: There is nothing of that name, or it can't be read.
    """
    return None if spec.start is None else trained_weights(spec.start, "start").learnt


def learnt_by(folder: RunFolder) -> Learnt | None:
    """Return what a run has kept of its data, or None of a run that has kept nothing.

    Raises:
        UserError: It is damaged.
    """
    return Learnt.read(folder.learnt, f"run {folder.run_id}")


def learnt_in(folder: Path) -> Learnt:
    """Return what an exported model holds besides its weights.

    Raises:
        UserError: It is damaged.
    """
    beside = folder / CONFIG_BESIDE_TRANSFORMERS
    config = read_config(beside if beside.is_file() else folder / CONFIG)
    tokenizer = folder / TOKENIZER
    return Learnt(config, {TOKENIZER: tokenizer} if tokenizer.is_file() else {}, source=str(folder))


def begin_from(weights: TrainedWeights, model: nn.Module) -> None:
    """Put trained weights into a model of the same architecture, before it is distributed.

    Raises:
        UserError: A tensor is missing, unknown or of another shape.
    """
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(ATTACHED)}
    as_task = f", with task={weights.task}" if weights.task else ""
    for key, value in own.items():
        if key not in weights.state:
            raise UserError(
                f"{weights.source}: lacks {key}, which the model has; set model.* as it was trained"
            )
        if weights.state[key].shape != value.shape:
            raise UserError(
                f"{weights.source}: {key} is {tuple(weights.state[key].shape)} there and "
                f"{tuple(value.shape)} here: model and data must be as it was trained{as_task}"
            )
    for key in weights.state:
        if key not in own:
            raise UserError(f"{weights.source}: holds {key}, which the model doesn't have")
    model.load_state_dict(weights.state, strict=False)


def companion_of(name: str, field: str, task: Task) -> HeadedModel:
    """Return a companion of a task's model: it may be of another size, but must give as many outputs.

    Args:
        name: A run, a folder, or ``hf:PATH``.
        field: Of the spec, for messages.
        task: What is trained.

    Raises:
        UserError: It can't be read, or doesn't fit the task.
    """
    if name.startswith(_CHECKPOINT):
        found = task.build_companion({"source": name})
    else:
        weights = trained_weights(name, field)
        if weights.task is not None and not task.takes_models_of(weights.task):
            raise UserError(f"{weights.source}: was trained as task={weights.task}, not {task.slug}")
        if weights.learnt is not None and task.companions_read_alike:
            _require_same_reading(weights, task)
        found = task.build_companion(weights.model, empty=True)
        begin_from(weights, found)
    if not task.companions_read_alike:
        return found
    own, theirs = (len(model.head().weight) for model in (task.build_model(), found))
    if own != theirs:
        raise UserError(f"{field}={name}: has {theirs} outputs; the model has {own}{_of_other_tokens(task)}")
    return found


def companion_models(spec: RunSpec) -> dict[str, dict[str, Any]]:
    """Return the model's part of the spec of every companion that is not a copy, by what names it.

    Raises:
        UserError: There is nothing of that name, or it can't be read.
    """
    named = {
        role.of: f"roles.{name}.of" for name, role in spec.roles.items() if role.of not in (None, "start")
    }
    return {
        str(of): {"source": of} if str(of).startswith(_CHECKPOINT) else trained_weights(str(of), field).model
        for of, field in named.items()
    }


def _require_same_reading(weights: TrainedWeights, task: Task) -> None:
    """Refuse a companion that reads inputs or classes in another way than the model.

    Raises:
        UserError: Saying what differs.
    """
    theirs, own = cast("Learnt", weights.learnt), task.learnt
    for name in ("classes", "names"):
        if name in own.facts and list(theirs.facts.get(name, [])) != list(own.facts[name]):
            raise UserError(f"{weights.source}: its {name} differ from the model's, or come in another order")
    for name, file in own.files.items():
        other = theirs.files.get(name)
        if other is not None and other.read_bytes() != file.read_bytes():
            raise UserError(
                f"{weights.source}: reads with another {name} than the model; use one for both"
                + _of_other_tokens(task)
            )


def _of_other_tokens(task: Task) -> str:
    """Return which losses take a companion that reads with another tokenizer, for messages about one."""
    able = [slug for slug, entry in declarations("losses").items() if "other-tokens" in entry.flags]
    there = able and TOKENIZER in task.learnt.files
    return f"; what compares models of different tokens: {', '.join(able)}" if there else ""


def settled(spec: RunSpec) -> RunSpec:
    """Return a run with what other models decide settled, before it starts.

    What it begins from brings its model, unless the spec says one itself, and what the task takes from it,
    such as the tokenizer; what the task leaves to companions is taken from them. A run's name becomes its
    id, since a newer run may take the name.

    Raises:
        UserError: There is no such run or model.
    """
    if spec.start is not None:
        spec = _begun(spec, spec.start)
    for name, role in spec.roles.items():
        field, of = f"roles.{name}.of", role.of
        if of is None or of == "start":
            continue
        named = _id_of(of, field)
        roles = {**spec.roles, name: role.model_copy(update={"of": named})}
        spec = task_of(spec).adopting(
            spec.model_copy(update={"roles": roles}), _learnt_of(named, field), name
        )
    return spec


def _begun(spec: RunSpec, start: str) -> RunSpec:
    values = spec.model_dump(mode="json", exclude_unset=True)
    exported = Path(start).expanduser() / CONFIG_BESIDE_TRANSFORMERS
    if start.startswith(_CHECKPOINT) or exported.is_file():
        # Such a folder is a model by itself, with its configuration and its tokenizer.
        own = {**read_config(exported).get("model", {})} if exported.is_file() else {}
        source = f"{_CHECKPOINT}{Path(start).expanduser().absolute()}" if exported.is_file() else start
        values = {**values, "start": None, "model": {**own, **values.get("model", {}), "source": source}}
        return type(spec).parse(values, source=f"start={start}")
    named = _id_of(start, "start")
    weights = trained_weights(named, "start")
    values = {"model": weights.model, **values, "start": named}
    spec = type(spec).parse(values, source=f"start={start}")
    return spec if weights.learnt is None else task_of(spec).adopting(spec, weights.learnt)


def _id_of(name: str, field: str) -> str:
    """Return the id of a run by its name; folders and addresses stay as they are."""
    if name.startswith(_CHECKPOINT) or Path(name).expanduser().is_dir():
        return name
    return _run_of(name, field).run_id


def _learnt_of(name: str, field: str) -> Learnt:
    """Return what a companion has learnt of its data besides weights; arguments as of ``companion_of``."""
    if name.startswith(_CHECKPOINT):
        tokenizer = Path(name.removeprefix(_CHECKPOINT)).expanduser() / TOKENIZER
        return Learnt({}, {TOKENIZER: tokenizer} if tokenizer.is_file() else {})
    path = Path(name).expanduser()
    if (path / WEIGHTS).is_file():
        return learnt_in(path)
    return learnt_by(_run_of(name, field)) or Learnt({})


def _run_of(name: str, field: str) -> RunFolder:
    try:
        return RunFolder.find(name)
    except UserError as error:
        raise UserError(f"{field}={name}: is no folder of an exported model, and {error}") from None


def check_companions(spec: RunSpec, task: Task) -> None:
    """Check, before workers start, that what a run begins from and what goes beside it fits.

    Raises:
        UserError: Naming the field, and what is wrong.
    """
    if spec.start is not None:
        begin_from(trained_weights(spec.start, "start"), task.build_model())
    for name, role in spec.roles.items():
        if role.of is not None and role.of != "start":
            companion_of(role.of, f"roles.{name}.of", task)
