"""Small training runs without Ray, for tests: a corpus, a spec, and one call."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lossworks.data import TokenizedCorpus, prepare
from lossworks.runs import RunFolder
from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks.tasks.text.language_model import TrainSpec
from lossworks.tracking import Journal
from lossworks.tracking.journal import read_all
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, train
from lossworks.training.weights.start import learnt_of_start, settled

VOCABULARY = 300


def tiny_spec(text: Path, **changes: Any) -> TrainSpec:
    """Return a spec that trains in about a second; ``changes`` are nested like the YAML."""
    values: dict[str, Any] = {
        "steps": 6,
        "batch_size": 6,
        "workers": 1,
        "sharding": {"kind": "none"},
        "data": {
            "corpus": f"text:{text}",
            "vocab_size": VOCABULARY,
            "sequence_length": 16,
            "held_out_fraction": 0.1,
        },
        "model": {"layers": 2, "width": 16, "heads": 2},
        "evaluation": {"every": 3, "sequences": 7},
        "checkpoint": {"every": 3},
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "tracking": {"model": False},
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
    return TrainSpec.parse(values)


def prepared(spec: TrainSpec) -> TokenizedCorpus:
    """Return the spec's corpus."""
    return prepare(spec.text())


def run_training(
    spec_values: dict[str, Any],
    corpus: str | None,
    folder: str,
    stop_after: int | None = None,
    profile: str | None = None,
) -> dict[str, Any]:
    """Train in this process, or as one rank, and return rows and outcome as plain data."""
    rows: list[tuple[int, dict[str, float]]] = []
    notices: list[str] = []
    spec = parse_train_spec(spec_values)
    outcome = train(
        Job(
            spec=spec,
            prepared=Path(corpus) if corpus else None,
            checkpoints=CheckpointStore(Path(folder), keep=spec.checkpoint.keep),
            record=lambda step, metrics: rows.append((step, metrics)),
            notify=notices.append,
            profile=Path(profile) if profile else None,
            results=Path(folder) / "methods",
            # Asked during step n, before its row is recorded.
            stop_requested=lambda: stop_after is not None and len(rows) + 1 >= stop_after,
        )
    )
    return {"rows": rows, "notices": notices, **asdict(outcome)}


def run_in_folder(values: dict[str, Any], run_id: str = "run") -> RunFolder:
    """Train in this process and leave a run's folder in the home folder, as a driver does; no text."""
    spec = settled(parse_train_spec(values))
    folder = RunFolder.create(spec, run_id)
    learnt = task_of(spec).prepare(spec, None, learnt_of_start(spec)).learnt
    if learnt is not None:
        learnt.write(folder.learnt)
    with Journal.open(folder.journal) as journal:
        store = CheckpointStore(folder.checkpoints, keep=spec.checkpoint.keep)
        outcome = train(Job(spec, None, store, journal.write, results=folder.results, learnt=learnt))
    outcome.write(folder.outcome_file)
    return folder


def last_evaluation(folder: RunFolder) -> dict[str, float]:
    """Return the row of a run's journal that was measured last on held-out data."""
    rows = [row["metrics"] for row in read_all(folder.journal) if "eval/loss" in row["metrics"]]
    return rows[-1]


def run_several(runs: list[tuple[dict[str, Any], str]], corpus: str | None) -> list[dict[str, Any]]:
    """Train specs into folders one after the other, since starting processes takes longer than a tiny run."""
    return [run_training(values, corpus, folder) for values, folder in runs]


def losses(result: dict[str, Any]) -> list[float]:
    """Return the training loss of every recorded step."""
    return [metrics["train/loss"] for _, metrics in result["rows"]]
