"""Models in MLflow: logged by the end of a run, loaded by name, served over HTTP."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.cli import main
from lossworks.data import load_examples, prepare
from lossworks.data.example_sources import read_examples
from lossworks.errors import UserError
from lossworks.models import TextGenerator, TextScorer, load_classifier, load_model, load_predictor
from lossworks.models.generation.texts import Writing
from lossworks.reporting.finish import finish_run_folder, sync_run
from lossworks.runs import RunFolder
from lossworks.specs import ModelTrackingSpec
from lossworks.tasks import parse_train_spec
from lossworks.tracking import Journal, create_run
from lossworks.tracking.client import connect
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, train
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks_testing.classification import tiny
from lossworks_testing.server import free_port
from lossworks_testing.training import prepared, tiny_spec

TEN_LINES = """
import sys, pandas as pd, mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model("models:/small words/1")
texts = pd.DataFrame({"text": [open(sys.argv[2]).read(), ""]})
answer = model.predict(texts, params={"new_tokens": 4, "temperature": 0.0})
print(answer.to_json())
"""


def trained(spec):
    """Train in this process and finish the run as a driver does; return its folder and the notices."""
    run_id = create_run(spec.tracking, name=spec.name, parameters={}, tags={})
    folder, notices = RunFolder.create(spec, run_id), []
    text = prepared(spec).folder if spec.task == "language-model" else None
    with Journal.open(folder.journal) as journal:
        store = CheckpointStore(folder.checkpoints, keep=2)
        outcome = train(Job(spec=spec, prepared=text, checkpoints=store, record=journal.write))
    outcome.write(folder.outcome_file)
    finish_run_folder(folder, None, status="FINISHED", reason=None, notify=notices.append)
    return folder, notices


@pytest.fixture(scope="module")
def module_home(tmp_path_factory, template):
    """A home folder with a migrated store for all tests of this file."""
    home = tmp_path_factory.mktemp("home")
    (home / "mlflow.db").write_bytes(template.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def language_run(module_home, tmp_path_factory):
    """A finished run with a registered language model."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    spec = tiny_spec(text, name="words", steps=30, tracking={"register": "small words"})
    folder, notices = trained(spec)
    assert notices == []
    return folder


@pytest.fixture(scope="module")
def held_out(language_run, tmp_path_factory):
    """A file with the text that was held out, and its loss as `lossworks evaluate` measures it."""
    corpus = prepare(language_run.spec().text())
    rows = corpus.split(language_run.spec().data)[1]
    tokens = rows.batch(np.arange(len(rows)))["inputs"]
    exported = tmp_path_factory.mktemp("exported") / "model"
    export_run(language_run, exported)
    file = exported.with_name("held_out.txt")
    file.write_text(load_model(exported)[1].decode(tokens.flatten().tolist()))
    return file, evaluate_folder(exported).loss, exported


def test_ten_lines_load_it_by_name_and_measure_the_runs_own_loss(language_run, held_out, module_home):
    """In a process that knows nothing of the run; an empty text has no loss."""
    file, loss, _ = held_out
    uri = f"sqlite:///{module_home}/mlflow.db"
    command = [sys.executable, "-c", TEN_LINES, uri, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)

    # Cut at other places than in training, so that a few tokens see other text before them.
    assert answer["loss"]["0"] == pytest.approx(loss, rel=0.01)
    assert answer["loss"]["1"] is None
    assert answer["bits_per_byte"]["0"] > 0
    assert answer["continuation"].keys() == {"0", "1"}


def test_the_scorer_is_the_plain_formula(held_out):
    """Every token of the text counts once, behind the end of a document, in sequences of 16."""
    file, _, exported = held_out
    text = file.read_text()[:400]
    model, tokenizer = load_model(exported)
    ids = torch.tensor([0, *tokenizer.encode(text).ids])
    nats = 0.0
    model.requires_grad_(False)
    for start in range(0, len(ids) - 1, 16):
        part = ids[start : start + 17]
        logits = model.logits(part[None, :-1])[0].double().log_softmax(-1)
        nats -= float(logits[torch.arange(len(part) - 1), part[1:]].sum())
    found = TextScorer.load(exported).score(text)

    assert found.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_continuations_follow_the_seed(held_out):
    """The same seed gives the same text, another one another."""
    generator = TextGenerator.load(held_out[2])

    def written(prompts, **how):
        return [one.text for (one,) in generator.continuations(prompts, Writing(**how))]

    found = [written(["abc"], tokens=30, seed=seed) for seed in (1, 1, 2)]

    assert found[0] == found[1] != found[2]
    assert written(["a longer text", "abc"], tokens=30, seed=1)[1:] == found[0]
    assert written(["abc"], tokens=0) == [""]


def test_what_is_logged_holds_no_pickle_and_exact_versions(language_run, module_home):
    """The files are ours and MLflow's; the requirements pin what loading needs."""
    (model,) = (module_home / "artifacts" / "models").glob("*/artifacts")
    names = {path.name for path in model.rglob("*") if path.is_file()}
    requirements = (model / "requirements.txt").read_text().split()
    run = connect(language_run.spec().tracking).get_run(language_run.run_id)

    assert {"model.safetensors", "config.json", "tokenizer.json", "served_language_model.py"} <= names
    assert not [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
    assert {line.partition("==")[0] for line in requirements} == {
        *("lossworks", "mlflow", "numpy", "pandas", "safetensors", "tokenizers", "torch")
    }
    assert all("==" in line for line in requirements)
    assert run.data.tags["lossworks.model"] == f"models:/{model.parent.name}"
    assert not list(language_run.path.glob(".model-*"))


def test_a_second_sync_logs_and_registers_nothing_new(language_run):
    """A run that is brought up to date again keeps its one model and version."""
    client = connect(language_run.spec().tracking)
    sync_run(language_run, pytest.fail)

    assert len(client.search_model_versions("name='small words'")) == 1
    assert len(client.get_run(language_run.run_id).outputs.model_outputs) == 1


def test_a_classifier_takes_examples_as_they_come(module_home, tmp_path):
    """Probabilities of raw inputs, standardised inside, give the accuracy the run measured."""
    spec = parse_train_spec(tiny(name="wines", tracking={"register": "wines"}))
    folder, notices = trained(spec)
    raw, labels, names, *_ = read_examples(spec.data, spec.seed)
    data = load_examples(spec.data, spec.seed)
    found = predicted("wines", module_home, raw.astype(np.float32))
    scaled = data.standardisation(raw).astype(np.float32)
    held = [int(np.flatnonzero((scaled == row).all(1))[0]) for row in data.held_out.inputs.numpy()]
    accuracy = float((found[held].argmax(1) == labels[held]).mean())
    outcome = json.loads(folder.outcome_file.read_text())

    assert notices == []
    assert found.shape == (len(raw), len(names))
    assert found.dtype == np.float32
    assert found.sum(1) == pytest.approx(np.ones(len(raw)), abs=1e-5)
    assert accuracy == pytest.approx(outcome["metrics"]["eval/accuracy"])


def test_classifiers_are_exported_and_evaluated(module_home, tmp_path, capsys):
    """`lossworks export` writes safetensors and config, and `lossworks evaluate` finds what the run found."""
    spec = parse_train_spec(tiny(name="plain", data={"source": "wine", "standardise": False}))
    folder, _ = trained(spec)
    assert main(["export", folder.run_id, "--to", str(tmp_path / "model")]) == 0
    assert "config.json, model.safetensors of step" in capsys.readouterr().out
    classifier = load_classifier(tmp_path / "model")

    assert classifier.names == load_examples(spec.data, spec.seed).names
    assert classifier.probabilities(np.zeros((0, 13))).shape == (0, 3)
    with pytest.raises(UserError, match=r"trained on \(13,\)"):
        classifier.probabilities(np.zeros((2, 12)))
    assert main(["evaluate", str(tmp_path / "model"), "--json", str(tmp_path / "figures.json")]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    outcome = json.loads(folder.outcome_file.read_text())
    assert figures["eval/accuracy"] == pytest.approx(outcome["metrics"]["eval/accuracy"])
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="isn't a classifier"):
        load_classifier(tmp_path / "model")


def predicted(name, module_home, inputs):
    """Return what the registered model of that name says of examples."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{module_home}/mlflow.db")
    try:
        return mlflow.pyfunc.load_model(f"models:/{name}/1").predict(inputs)
    finally:
        mlflow.set_tracking_uri(None)


def test_regressions_and_multi_label_models_take_examples_as_they_come(module_home, tmp_path):
    """Values in the targets' unit, and scores of labels, as the exported model gives them; no pickle."""
    numbers = tiny(name="numbers", task="regression", loss="huber", data={"source": "friedman:60"})
    topics = tiny(name="topics", task="multi-label", data={"source": "topics:60", "labels": 12}) | {
        "loss": "decoupled-softmax"
    }
    for values, shape in ((numbers, (4,)), (topics, (4, 12))):
        spec = parse_train_spec(values | {"tracking": {"register": values["name"]}})
        folder, notices = trained(spec)
        export_run(folder, tmp_path / spec.name)
        exported = load_predictor(tmp_path / spec.name)
        raw = np.random.default_rng(0).normal(size=(4, *exported.shape)).astype(np.float32)
        found = predicted(spec.name, module_home, raw)

        assert notices == []
        assert found.shape == shape
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, exported.predict(raw), rtol=1e-6)


def test_a_model_of_an_unknown_format_is_passed_over(module_home, monkeypatch):
    """One of another package's task: the run is finished, and a notice says why there is no model."""
    from lossworks.tasks.classification import ClassificationTask

    def save(cls, spec, learnt, to, state, provenance):
        to.mkdir()
        (to / "config.json").write_text(json.dumps({"format": "theirs", "provenance": provenance}))

    monkeypatch.setattr(ClassificationTask, "save", classmethod(save))
    spec = parse_train_spec(tiny(name="theirs", tracking={"model": True}))
    folder, notices = trained(spec)
    run = connect(spec.tracking).get_run(folder.run_id)

    assert len(notices) == 1
    assert notices[0].startswith(
        "the model could not be logged: format='theirs' is not one that MLflow is given"
    )
    assert run.info.status == "FINISHED"
    assert "lossworks.model" not in run.data.tags
    assert not run.outputs.model_outputs


def test_a_model_that_cannot_be_logged_is_a_notice(module_home, monkeypatch):
    """The run is finished all the same."""

    def refuse(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("lossworks.training.weights.export.export_run", refuse)
    spec = parse_train_spec(tiny(name="full", tracking={"model": True}))
    folder, notices = trained(spec)

    assert notices == ["the model could not be logged: No space left on device"]
    assert connect(spec.tracking).get_run(folder.run_id).info.status == "FINISHED"


def test_registering_implies_logging_and_names_are_checked():
    """MLflow refuses slashes and colons, which would be found out at the end of the run only."""
    assert ModelTrackingSpec(model=False, register="name").logs_model
    assert not ModelTrackingSpec(model=False).logs_model
    for wrong in ("", "a/b", "a:b", "..", " a"):
        with pytest.raises(UserError, match="register"):
            ModelTrackingSpec.parse({"register": wrong})


@pytest.mark.slow
def test_mlflow_serves_it_over_http(language_run, held_out, module_home, tmp_path):
    """`mlflow models serve` answers with the numbers of the model in this process."""
    file, _, exported = held_out
    port, text = free_port(), file.read_text()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/small words/1"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # MLflow starts uvicorn by name: that of this interpreter, whether its folder is on PATH or not.
    uvicorn = tmp_path / "uvicorn"
    uvicorn.write_text(f'#!/bin/sh\nexec {sys.executable} -m uvicorn "$@"\n')
    uvicorn.chmod(0o755)
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{module_home}/mlflow.db",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, tmp_path / "log")
        asked = {"dataframe_split": {"columns": ["text"], "data": [[text]]}, "params": {"new_tokens": 5}}
        answer = post(f"http://127.0.0.1:{port}/invocations", asked)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    scorer = TextScorer.load(exported)
    (found,) = answer["predictions"]

    assert found["loss"] == pytest.approx(scorer.score(text).loss, rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(scorer.score(text).bits_per_byte, rel=1e-6)
    ((written,),) = TextGenerator.load(exported).continuations([text], Writing(tokens=5), most=scorer.length)
    assert found["continuation"] == written.text


def wait_for(url, process, log: Path):
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)
