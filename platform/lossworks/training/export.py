"""A trained model out of a run's checkpoint, and its held-out loss afterwards."""

from collections.abc import Sequence
from pathlib import Path

from lossworks import __version__
from lossworks.data import TokenizedCorpus, prepare
from lossworks.errors import UserError
from lossworks.models import load_model, read_provenance
from lossworks.runs import RunFolder
from lossworks.specs import DataSpec
from lossworks.tasks.interface import Evaluation
from lossworks.tasks.language_model import LanguageTask, TrainSpec
from lossworks.tasks.registry import task_of
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import evaluate
from lossworks.training.start import ATTACHED, choose_checkpoint


def export_run(folder: RunFolder, to: Path, *, best: bool = True) -> int:
    """Write a run's model as safetensors with config and tokenizer, and return the step it is from.

    Args:
        folder: The run; of a classifier there is no tokenizer.
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
        "task": task_of(spec).slug,
        "data": spec.model_dump(mode="json").get("data"),
    }
    state = tensors_in(checkpoint.folder, "model.")
    own = {name: value for name, value in state.items() if not name.startswith(ATTACHED)}
    task_of(spec).open(spec, None).save(to, own, provenance)
    return checkpoint.step


def evaluate_folder(folder: Path, *, overrides: Sequence[str] = (), limit: int | None = None) -> Evaluation:
    """Return an exported model's loss on the held-out part of its corpus, or of another.

    Args:
        folder: What ``export_run`` made.
        overrides: ``data.key=value``, to evaluate on other text.
        limit: Sequences to read; None for all.

    Raises:
        UserError: The folder or the text can't be read.
    """
    model, _ = load_model(folder)
    corpus, data = _text(folder, overrides)
    return evaluate(
        model,
        LanguageTask(TrainSpec(data=data), corpus),
        World.current(),
        limit=limit,
        micro_batch_size=None,
        bf16=False,
    )


def _text(folder: Path, overrides: Sequence[str]) -> tuple[TokenizedCorpus, DataSpec]:
    """Return the corpus that an exported model was trained on, tokenised with its own tokenizer."""
    wrong = [text for text in overrides if not text.startswith("data.")]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: only data.key=value says what to evaluate on")
    stored = DataSpec.parse(read_provenance(folder)["data"])
    data = stored.override([text.removeprefix("data.") for text in overrides])
    data = data.model_copy(update={"tokenizer": str((folder / "tokenizer.json").absolute())})
    return prepare(data), data
