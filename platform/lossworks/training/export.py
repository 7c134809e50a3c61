"""A trained model out of a run's checkpoint, and its held-out loss afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossworks import __version__
from lossworks.data import TokenizedCorpus, load_examples, prepare
from lossworks.errors import UserError
from lossworks.models import (
    HeadedModel,
    build_classifier,
    build_model,
    load_model,
    read_provenance,
    save_classifier,
    save_model,
)
from lossworks.runs import RunFolder
from lossworks.specs import ClassifierSpec, DataSpec, TrainSpec
from lossworks.training.checkpoint import Checkpoint, CheckpointStore, find_damage, load_shards
from lossworks.training.evaluation import evaluate
from lossworks.training.language import LanguageTask
from lossworks.training.task import Evaluation
from lossworks.training.world import World


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
        "data": spec.data.model_dump(mode="json"),
    }
    if isinstance(spec, TrainSpec):
        _export_language_model(spec, checkpoint, to, provenance)
    else:
        _export_classifier(spec, checkpoint, to, provenance)
    return checkpoint.step


def _export_language_model(
    spec: TrainSpec, checkpoint: Checkpoint, to: Path, provenance: dict[str, Any]
) -> None:
    corpus = prepare(spec.text())
    model = build_model(spec.model, vocab_size=corpus.vocab_size, seed=spec.seed)
    save_model(
        to,
        spec=spec.model,
        state=_trained(model, checkpoint),
        vocab_size=corpus.vocab_size,
        tokenizer_path=corpus.tokenizer_path,
        provenance=provenance,
    )


def _export_classifier(
    spec: ClassifierSpec, checkpoint: Checkpoint, to: Path, provenance: dict[str, Any]
) -> None:
    data = load_examples(spec.data, spec.seed)
    model = build_classifier(spec.model, shape=data.shape, classes=len(data.names), seed=spec.seed)
    save_classifier(
        to,
        spec=spec.model,
        state=_trained(model, checkpoint),
        shape=data.shape,
        names=data.names,
        standardisation=data.standardisation,
        provenance=provenance,
    )


def _trained(model: HeadedModel, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the model's state as a checkpoint has it, whole, however it was sharded."""
    state: dict[str, Any] = {"model": model.state_dict()}
    load_shards(state, checkpoint.folder)
    return dict(state["model"])


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


def choose_checkpoint(folder: RunFolder, *, best: bool = True) -> Checkpoint:
    """Return a run's whole checkpoint with the least held-out loss, or the newest.

    Raises:
        UserError: There is none.
    """
    store = CheckpointStore(folder.checkpoints, keep=folder.spec().checkpoint.keep)
    chosen = store.best() if best else None
    if chosen is None or find_damage(chosen.folder) is not None:
        chosen, complaints = store.newest()
        if chosen is None:
            why = f": {'; '.join(complaints)}" if complaints else " yet"
            raise UserError(f"run {folder.run_id}: has no whole checkpoint{why}")
    return chosen


def _text(folder: Path, overrides: Sequence[str]) -> tuple[TokenizedCorpus, DataSpec]:
    """Return the corpus that an exported model was trained on, tokenised with its own tokenizer."""
    wrong = [text for text in overrides if not text.startswith("data.")]
    if wrong:
        raise UserError(f"override {wrong[0]!r}: only data.key=value says what to evaluate on")
    stored = DataSpec.parse(read_provenance(folder)["data"])
    data = stored.override([text.removeprefix("data.") for text in overrides])
    data = data.model_copy(update={"tokenizer": str((folder / "tokenizer.json").absolute())})
    return prepare(data), data
