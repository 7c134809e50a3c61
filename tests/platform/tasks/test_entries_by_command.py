"""Every entry of the catalogue has a command that runs it, and the command does."""

import shlex
from pathlib import Path

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.catalogue.registry import declarations
from lossworks.cli import main
from lossworks.tasks import read_train_spec
from lossworks.tasks.registry import task_of
from lossworks.training.weights.start import settled
from lossworks_testing.training import run_in_folder, run_training, tiny_spec

ROOT = Path(__file__).parents[3]
EXAMPLES = {slug: shlex.split(entry.example) for slug, entry in declarations().items()}
TRAININGS = [slug for slug, words in EXAMPLES.items() if words[:2] == ["lossworks", "train"]]
SMALL = [
    *("steps=2", "workers=1", "sharding=none", "schedule.warmup_steps=0"),
    *("evaluation.every=2", "evaluation.sequences=40", "checkpoint.every=2"),
]
# A removal of norms has to come to its end.
FURTHER = {
    "ln-removal": ["steps=40", "evaluation.every=40", "checkpoint.every=40"],
    "barm": ["methods=[{name: barm, starts: [1]}]"],
}
SMALL_TEXT = [
    *("batch_size=4", "data.vocab_size=300", "data.sequence_length=16", "data.held_out_fraction=0.1"),
    *("model.layers=1", "model.width=16", "model.heads=2"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text of a few lines, instead of the interpreter's sources."""
    path = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    path.write_text(path.read_text().replace("a ", "a\n"))
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """The folder of a run of a small language model, by which others begin."""
    spec = tiny_spec(text, steps=2, model={"layers": 1, "norm": "layernorm"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        return run_in_folder(spec.model_dump(mode="json")).path


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """The folder of a run of a small segmenter, by which an adaptation begins."""
    spec = read_train_spec(
        str(ROOT / "jobs/specs/walls.yaml"), [*SMALL, "data.source=vessels:8", "data.side=32"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        return run_in_folder(spec.model_dump(mode="json")).path


def test_every_entry_has_a_command():
    """So that nothing in the catalogue can only be had from Python."""
    assert [slug for slug, words in EXAMPLES.items() if not words] == []
    assert {words[1] for words in EXAMPLES.values()} == {"train", "analyse"}


@pytest.mark.parametrize("slug", TRAININGS)
def test_the_command_of_an_entry_trains_with_it(slug, text, trained, segmenter, tmp_path, monkeypatch):
    """From its spec, with few steps; the entry is what the run has, and the run finishes."""
    monkeypatch.chdir(ROOT)
    file, *overrides = EXAMPLES[slug][2:]
    if "adapt" in file:
        overrides = [text.replace("=RUN", f"={segmenter}") for text in overrides]
    elif any(text.startswith("start=") or "other-tokens" in file for text in overrides):
        overrides = [text.replace("=RUN", f"={trained}") for text in overrides]
    else:
        overrides = [text.replace("=RUN", "=start") for text in overrides]  # the only model that is here
    spec = read_train_spec(file, [*overrides, *SMALL, *FURTHER.get(slug, [])])
    if hasattr(spec.data, "patch"):
        kind = spec.data.source.partition(":")[0]
        spec = settled(spec.override([f"data.source={kind}:24", "data.side=32"]))
    elif hasattr(spec.data, "patch_hop"):
        spec = settled(spec.override(["data.source=songs:4", "data.seconds=1"]))
    elif spec.start is not None:
        spec = settled(spec.override(["batch_size=4", "data.sequence_length=64"]))
    elif hasattr(spec.data, "corpus"):
        spec = settled(spec.override([*SMALL_TEXT, f"data.corpus=text:{text}"]))
    named = [entry.name for entry in (*spec.loss.terms, *spec.methods, *spec.analyses)]
    prepared = task_of(spec).prepare(spec).folder
    result = run_training(
        spec.model_dump(mode="json"), str(prepared) if prepared else None, str(tmp_path / "run")
    )

    assert slug in named
    assert (result["status"], result["step"], result["reason"]) == ("finished", spec.steps, "")
    assert set(task_of(spec).measured_by(spec)) <= result["metrics"].keys()


@pytest.mark.parametrize("slug", [slug for slug in EXAMPLES if slug not in TRAININGS])
def test_the_command_that_compares_runs_asks_for_them(slug, capsys):
    """There are none of the example's names."""
    assert main(EXAMPLES[slug][1:]) == 2
    assert "run RUN: not found" in capsys.readouterr().err
