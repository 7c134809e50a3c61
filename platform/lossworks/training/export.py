"""A trained model out of a run's checkpoint, and its held-out loss afterwards."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossworks import __version__
from lossworks.data import TokenizedCorpus, prepare
from lossworks.errors import UserError
from lossworks.models import build_model, load_model, save_model
from lossworks.runs import RunFolder
from lossworks.specs import DataSpec, TrainSpec
from lossworks.training.checkpoint import Checkpoint, CheckpointStore, find_damage, load_shards
from lossworks.training.evaluation import evaluate
from lossworks.training.language import LanguageTask
from lossworks.training.task import Evaluation
from lossworks.training.world import World


def export_run(folder: RunFolder, to: Path, *, best: bool = True) -> int:
    """Write a run's model as safetensors with config and tokenizer, and return the step it is from.

    Args:
        folder: The run.
        to: Folder to make.
        best: Take the checkpoint with the least held-out loss; otherwise the newest.

    Raises:
        UserError: There is no whole checkpoint, or ``to`` holds something already.
    """
    spec = folder.spec()
    if not isinstance(spec, TrainSpec):
        raise UserError(f"run {folder.run_id}: trained a classifier; only language models can be exported")
    checkpoint = _choose(folder, spec, best=best)
    corpus = prepare(spec.text())
    model = build_model(spec.model, vocab_size=corpus.vocab_size, seed=spec.seed)
    state: dict[str, Any] = {"model": model.state_dict()}
    load_shards(state, checkpoint.folder)
    model.load_state_dict(state["model"])
    save_model(
        to,
        spec=spec.model,
        state=state["model"],
        vocab_size=corpus.vocab_size,
        tokenizer_path=corpus.tokenizer_path,
        provenance={
            "run": folder.run_id,
            "step": checkpoint.step,
            "held_out_loss": checkpoint.held_out_loss,
            "lossworks": __version__,
            "data": spec.data.model_dump(mode="json"),
        },
    )
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


def _choose(folder: RunFolder, spec: TrainSpec, *, best: bool) -> Checkpoint:
    store = CheckpointStore(folder.checkpoints, keep=spec.checkpoint.keep)
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
    stored = DataSpec.parse(_provenance(folder)["data"])
    data = stored.override([text.removeprefix("data.") for text in overrides])
    data = data.model_copy(update={"tokenizer": str((folder / "tokenizer.json").absolute())})
    return prepare(data), data


def _provenance(folder: Path) -> dict[str, Any]:
    for name in ("lossworks.json", "config.json"):
        if (folder / name).is_file():
            return json.loads((folder / name).read_text())["provenance"]
    raise UserError(f"{folder}: holds no exported model")
