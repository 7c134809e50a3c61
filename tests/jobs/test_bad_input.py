"""What a user can get wrong: one line on standard error, exit status 2, nothing started."""

import pytest
import yaml

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.cli import main


@pytest.fixture
def file(tmp_path, home):
    """A good spec on a small text, to be broken by overrides."""
    text = write_text(tmp_path / "text.txt", words=2000)
    data = {"corpus": f"text:{text}", "vocab_size": 300, "sequence_length": 16}
    values = {"kind": "training", "data": data, "steps": 2}
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def refused(arguments, capsys, monkeypatch):
    """Run the command, expect exit status 2 and no Ray, and return its one line."""

    def started(*_):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("lossworks_jobs.clusters.ray_cluster._start", started)
    status = main(arguments)
    error = capsys.readouterr().err

    assert status == 2, error
    assert error.startswith("lossworks: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.layers=2", "did you mean model.layers?"),
        ("lr=0.1", "lr: unknown key; did you mean optimizer.lr?"),
        ("model.layers=0", "model.layers=0: input should be greater than or equal to 1"),
        ("optimizer.lr=fast", "optimizer.lr='fast'"),
        ("model.heads=3", "width=256 must be a multiple of heads=3"),
        ("sharding=none", "sharding=none is for workers=1"),
        ("sharding.vocab_parallel=true", "sharding.vocab_parallel=true needs sharding=fsdp, not ddp"),
        ("sharding={kind: fsdp, vocab_parallel: true}", "set model.tied=false"),
        ("data.corpus=text:/nowhere", "/nowhere"),
        ("data.corpus=web:x", "must be stdlib, text:PATH, hf:NAME, pairs:PATH"),
        ("data.vocab_size=50000", "data.vocab_size"),
        ("data.sequence_length=100000", "data.sequence_length"),
        ("workers=32", "workers=32 with resources_per_worker.CPU=1 need 32 CPU"),
        ("tracking.uri=http://127.0.0.1:9", "no answer from the server"),
        ("tracking.uri=file:///tmp/x", "no longer writes to plain folders"),
        ("storage=relative/path", "must be an absolute path"),
        ("storage=/proc/runs", "storage=/proc/runs: can't be written"),
        ("steps", "write it as key.path=value"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(file, override, message, capsys, monkeypatch):
    """The line names the field, its value and what would be right."""
    assert message in refused(["train", str(file), override], capsys, monkeypatch)


def test_an_empty_corpus_is_refused(file, tmp_path, capsys, monkeypatch):
    """A file without text can't be trained on."""
    (tmp_path / "empty.txt").write_text("")

    message = refused(["train", str(file), f"data.corpus=text:{tmp_path / 'empty.txt'}"], capsys, monkeypatch)
    assert "empty" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "SPEC is missing"),
        (["train", "nowhere.yaml"], "no such spec file"),
        (["train", "--resume", "nothing"], "run nothing: not found"),
        (["trian"], "trian: no such command; did you mean train?"),
        (["export", "nothing", "--to", "x"], "run nothing: not found"),
        (["evaluate", "/nowhere"], "/nowhere"),
        (["report", "nothing"], "run nothing: not found"),
        (["sync", "nothing"], "run nothing: not found"),
        (["bench", "trian"], "did you mean train?"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(arguments, message, home, capsys, monkeypatch):
    """Unknown commands, files and runs, too."""
    assert message in refused(arguments, capsys, monkeypatch)


def test_a_file_that_is_no_mapping_is_refused(tmp_path, home, capsys, monkeypatch):
    """A list, or text that is no YAML, says what a spec is."""
    path = tmp_path / "spec.yaml"
    for content, message in (("- 1\n", "holds a list"), ("a: [", "is not valid YAML")):
        path.write_text(content)
        assert message in refused(["train", str(path)], capsys, monkeypatch)


def test_an_address_without_a_cluster_is_refused_within_seconds(file, capsys):
    """Ray would try for more than a minute; the error names the option and the address."""
    assert main(["train", str(file), "--address", "127.0.0.1:9"]) == 2
    assert "--address 127.0.0.1:9: no Ray cluster answers there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task=regresion", "task='regresion' must be one of classification"),
        ("data.source=/nowhere", "must be one of digits"),
        ("data.source=csv:/nowhere.csv", "data.source=csv:/nowhere.csv: no such file or folder"),
        ("data.sourse=wine", "did you mean data.source?"),
        ("data.bag_size=5", "batch_size=64 must be a multiple of data.bag_size=5"),
        ("data.imbalance=0.5", "data.imbalance=0.5: input should be greater than or equal to 1"),
        ("data={source: wine}", "model.kind=cnn reads signals and images; examples of 13 features need mlp"),
        ("model.kind=vit", "model.kind='vit'"),
        ("activation_checkpointing=true", "activation_checkpointing=true is for language models"),
        ("loss=dco-step", "loss.name=dco-step can't train task=classification"),
    ],
)
def test_a_wrong_classifier_is_refused_in_one_line(override, message, home, capsys, monkeypatch):
    """Before Ray starts, also where only the examples tell."""
    given = ["train", "jobs/specs/digits.yaml", "model.kind=cnn", override]
    assert message in refused(given, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("command", "spec", "kind", "right"),
    [
        ("train", "tune/specs/label-noise.yaml", "a sweep", "tune"),
        ("train", "federated/specs/digits.yaml", "a federation", "federate"),
        ("tune", "jobs/specs/demo.yaml", "a training", "train"),
        ("tune", "federated/specs/digits.yaml", "a federation", "federate"),
        ("federate", "jobs/specs/digits.yaml", "a training", "train"),
        ("federate", "tune/specs/label-noise.yaml", "a sweep", "tune"),
        ("train", "tune/studies/log-z.yaml", "a study", "study"),
        ("study", "jobs/specs/digits.yaml", "a training", "train"),
    ],
)
def test_another_commands_spec_is_refused_by_what_it_is(
    command, spec, kind, right, home, capsys, monkeypatch
):
    """Rather than by each of its fields; the command that runs it is named."""
    error = refused([command, spec, "name=other"], capsys, monkeypatch)

    assert (
        error == f"lossworks: error: {spec}: describes {kind}, which `lossworks {right}` runs and resumes\n"
    )


@pytest.mark.parametrize("command", ["report", "sync", "export"])
def test_another_commands_run_is_refused_by_what_it_is(command, home, tmp_path, capsys):
    """The commands for trainings name the one that knows the run."""
    (tmp_path / "spec.yaml").write_text("base: {}\ntrials: 4\n")
    arguments = ["--to", str(tmp_path / "model")] if command == "export" else []

    assert main([command, str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "describes a sweep, which `lossworks tune` runs and resumes" in error
