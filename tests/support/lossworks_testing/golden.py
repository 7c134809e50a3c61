"""Golden loss curves: committed numbers of small runs of each task; what moves one has to explain it.

``python -m lossworks_testing.golden`` (with ``tests/support`` on the path) writes them again.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.tasks import parse_train_spec, task_class
from lossworks_testing.training import losses, run_training, tiny_spec

FOLDER = Path(__file__).parents[2] / "golden"
COMMAND = "PYTHONPATH=tests/support python -m lossworks_testing.golden"
_COMMON = {
    "steps": 8,
    "batch_size": 32,
    "workers": 1,
    "sharding": "none",
    "evaluation": {"every": 4, "sequences": 64},
    "checkpoint": {"every": 8},
    "tracking": {"model": False},
}
SPECS: dict[str, dict[str, Any]] = {
    "classification": {"task": "classification", "data": {"source": "digits"}, "model": {"width": 16}},
    "classification-cnn": {
        "task": "classification",
        "data": {"source": "digits", "label_noise": 0.2},
        "model": {"kind": "cnn", "layers": 1, "width": 8},
        "loss": [{"name": "cross-entropy"}, {"name": "log-z", "alone": True, "weight": 0.01}],
    },
    "regression": {
        "task": "regression",
        "data": {"source": "friedman:200"},
        "model": {"width": 16},
        "loss": {"name": "hl-gauss", "bins": 21, "v_min": -4, "v_max": 4},
    },
    "values": {
        "task": "regression",
        "data": {"source": "chain:400"},
        "model": {"width": 16},
        "loss": {"name": "categorical-td", "bins": 21},
        "roles": {"target": {"ema": 0.9}},
    },
    "multi-label": {
        "task": "multi-label",
        "data": {"source": "topics:200", "labels": 50},
        "model": {"width": 16},
        "loss": "decoupled-softmax",
    },
    "facts": {
        "task": "language-model",
        "data": {"corpus": "facts:20", "vocab_size": 300, "sequence_length": 48},
        "model": {"layers": 1, "width": 16, "heads": 2},
    },
    "preferences": {
        "task": "preferences",
        "data": {"corpus": "preferences:PAIRS", "vocab_size": 280, "sequence_length": 48},
        "model": {"layers": 1, "width": 16, "heads": 2},
    },
    "unlearning": {
        "task": "unlearning",
        "data": {"corpus": "facts:20", "vocab_size": 300, "sequence_length": 48},
        "model": {"layers": 1, "width": 16, "heads": 2},
    },
    "segmentation": {
        "task": "segmentation",
        "data": {"source": "walls:24", "side": 32, "augment": {"flip": True}},
        "model": {"levels": 1, "width": 4, "groups": 2},
        "loss": "ce-dice",
        "batch_size": 8,
    },
    "separation": {
        "task": "separation",
        "data": {"source": "songs:4", "seconds": 1.0, "window": 64, "fft": 64, "hop": 32},
        "model": {"maps": 2, "hidden": 64, "kernel": 4},
    },
    "pansharpening": {
        "task": "pansharpening",
        "data": {"source": "scene:32", "bands": 4},
        "model": {"features": [4, 4]},
        "batch_size": 4,
    },
    "sentences": {
        "task": "sentences",
        "data": {"sentences": 20, "copies": 20},
        "loss": [{"name": "eisl"}, {"name": "cross-entropy", "weight": 0.5}],
    },
}


def curve(name: str, folder: Path) -> dict[str, Any]:
    """Train the run of that name and return its losses step by step and its yardsticks at the end."""
    if name == "language-model":
        spec = tiny_spec(write_text(folder / "text.txt"), steps=8)
    else:
        values = json.dumps({**_COMMON, **SPECS[name]}).replace("PAIRS", str(write_pairs(folder)))
        spec = parse_train_spec(json.loads(values))
    kind = type(spec).model_fields["task"].default
    prepared = task_class(kind).prepare(spec).folder
    result = run_training(
        spec.model_dump(mode="json"), str(prepared) if prepared else None, str(folder / "run")
    )
    ends = {key: value for key, value in result["metrics"].items() if key.startswith("eval/")}
    return {"command": COMMAND, "losses": losses(result), "ends": ends}


def write_pairs(folder: Path) -> Path:
    """Write forty preferences into a folder, and return the file."""
    pairs = [{"prompt": f"{n}:", "chosen": f" yes {n}", "rejected": f" no {n + 1}"} for n in range(40)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def names() -> list[str]:
    """Return the names of all runs."""
    return ["language-model", *SPECS]


def main() -> None:
    """Write all curves."""
    FOLDER.mkdir(exist_ok=True)
    for name in names():
        with tempfile.TemporaryDirectory() as folder:
            found = curve(name, Path(folder))
        (FOLDER / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, found["losses"][0], found["losses"][-1])


if __name__ == "__main__":
    main()
