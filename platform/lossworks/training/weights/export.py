"""A trained model out of a run's checkpoint, and its held-out loss afterwards."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lossworks import __version__
from lossworks.catalogue.registry import declaration
from lossworks.errors import UserError
from lossworks.files import reading
from lossworks.models import HeadedModel, read_provenance
from lossworks.models.folders import CONFIG
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.tasks.interface import Evaluation, Predictions, Task
from lossworks.tasks.registry import parse_train_spec, task_of
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import evaluate
from lossworks.training.roles import Roles
from lossworks.training.weights.start import (
    begin_from,
    choose_checkpoint,
    learnt_by,
    learnt_in,
    run_weights,
    trained_weights,
)


def export_run(folder: RunFolder, to: Path, *, best: bool = True) -> int:
    """Write a run's model as safetensors with config and tokenizer, and return the step it is from.

    Args:
        folder: The run. Of one that has kept nothing of its data, its data are read again.
        to: Folder to make.
        best: Take the checkpoint with the least held-out loss; otherwise the newest.

    Raises:
        UserError: There is no whole checkpoint, or ``to`` holds something already.
    """
    spec = folder.spec()
    checkpoint = choose_checkpoint(folder, best=best)
    provenance = {
        "run": folder.run_id,
        "step": checkpoint.step,
        "held_out_loss": checkpoint.held_out_loss,
        "lossworks": __version__,
        "data": spec.model_dump(mode="json").get("data"),
        "spec": spec.model_dump(mode="json", exclude={"tracking"}),
    }
    kind = task_of(spec)
    learnt = learnt_by(folder) or kind.open(spec, None).learnt
    used, state = run_weights(folder, checkpoint)
    kind.save(used, learnt, to, state, provenance)
    return checkpoint.step


def evaluate_folder(folder: Path, *, overrides: Sequence[str] = (), limit: int | None = None) -> Evaluation:
    """Return what an exported model's task measures on the held-out part of its data, or of others.

    Terms of the loss that read companions, such as a teacher, are left out: an exported model has none.

    Args:
        folder: What ``export_run`` made.
        overrides: ``data.key=value``, to evaluate on other data.
        limit: Rows to read; None for all.

    Raises:
        UserError: The folder or the data can't be read.
    """
    wrong = [text for text in overrides if not text.startswith("data.")]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: only data.key=value says what to evaluate on")
    spec = _alone(exported_spec(folder)).override(overrides)

    def fill(model: HeadedModel) -> None:
        begin_from(trained_weights(str(folder), "model"), model)

    task, model = task_of(spec).reopen(spec, folder, learnt_in(folder), fill)
    task.objective.fit_to(model)
    roles = Roles(spec, task, _companions_begin(spec, task, model), World.current())
    return evaluate(
        model,
        task,
        World.current(),
        limit=limit,
        micro_batch_size=None,
        bf16=False,
        completed=roles.beside,
    )


def _companions_begin(spec: RunSpec, task: Task, model: HeadedModel) -> HeadedModel:
    """Return what companions are copies of: the model as its training began, or as it is, of moving ones."""
    if not any(role.of == "start" for role in spec.roles.values()):
        return model
    begin = task.build_model()
    if spec.start is not None:
        begin_from(trained_weights(spec.start, "start"), begin)
    return begin


def _alone(spec: RunSpec) -> RunSpec:
    """Return a run without the terms of its loss that read companions; the usual loss if none is left."""
    kept = [term for term in spec.loss.terms if not declaration(term.name).roles]
    if len(kept) == len(spec.loss.terms):
        return spec
    values = spec.model_dump(mode="json")
    values["loss"] = [{**term.model_dump(mode="json"), "plus": []} for term in kept]
    if not kept:
        del values["loss"]
    read = {role for one in (*spec.methods, *spec.analyses) for role in declaration(one.name).roles}
    read |= set(task_of(spec).reads(spec))
    values["roles"] = {name: role for name, role in values["roles"].items() if name in read}
    return type(spec).parse(values)


def predict_file(model: str, file: Path) -> Predictions:
    """Return what a trained model says of a file.

    Args:
        model: A folder of ``export_run``, or a run's id, beginning of an id, name or folder.
        file: Of a kind that the model's task reads.

    Raises:
        UserError: There is no such model, or the file can't be read.
    """
    with exported(model) as folder:
        return task_of(exported_spec(folder)).predict(folder, file)


@contextmanager
def exported(model: str) -> Iterator[Path]:
    """Yield the folder of an exported model: the one that is named, or one of a run for as long as it takes.

    Args:
        model: A folder of ``export_run``, or a run's id, beginning of an id, name or folder.

    Raises:
        UserError: There is no such model.
    """
    folder = Path(model).expanduser()
    if (folder / CONFIG).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        export_run(RunFolder.find(model), Path(temporary) / "model")
        yield Path(temporary) / "model"


def exported_spec(folder: Path) -> RunSpec:
    """Return the spec of the run that an exported model is from, with plain cross-entropy for older folders.

    Raises:
        UserError: The folder holds no model of ours.
    """
    with reading(f"{folder}, as a model of ours"):
        provenance = read_provenance(folder)
        stored = provenance.get("spec") or {"data": provenance.get("data", {})}
        return parse_train_spec(stored, source=str(folder))
