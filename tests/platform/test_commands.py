"""The command line and the commands that need no engine."""

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.error import HTTPError

import pytest
import torch
from safetensors import SafetensorError

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.cli import Command, main
from lossworks.errors import UserError
from lossworks.runs import RunFolder
from lossworks.specs import DataSpec
from lossworks.tensors import write_tensors
from lossworks.tracking import Journal, create_run
from lossworks.tracking.client import connect
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, train
from lossworks_testing.training import prepared, tiny_spec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was trained without a driver: its journal is written and MLflow has heard nothing yet."""
    text = write_text(tmp_path_factory.mktemp("text") / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.mktemp("home")))
        spec = tiny_spec(text, name="quiet")
        run_id = create_run(spec.tracking, name=spec.name, parameters=spec.flat(), tags={})
        folder = RunFolder.create(spec, run_id)
        with Journal.open(folder.journal) as journal:
            outcome = train(
                Job(
                    spec=spec,
                    prepared=prepared(spec).folder,
                    checkpoints=CheckpointStore(folder.checkpoints, keep=2),
                    record=journal.write,
                )
            )
        outcome.write(folder.outcome_file)
        yield folder


def test_sync_brings_a_run_up_to_date_once(run, capsys):
    """After an outage that outlived the run: rows, artifacts and status arrive; again, nothing doubles."""
    client = connect(run.spec().tracking)
    before = client.get_run(run.run_id).info.status
    assert main(["sync", "quiet"]) == 0
    assert main(["sync", run.run_id[:10]]) == 0

    assert before == "RUNNING"
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert "report.png" in {file.path for file in client.list_artifacts(run.run_id)}
    first, second = capsys.readouterr().out.splitlines()
    assert "6 rows delivered" in first
    assert "0 rows delivered" in second


def test_report_draws_the_picture_again(run, capsys):
    """The path is printed and holds a PNG."""
    run.report.unlink(missing_ok=True)

    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_bytes().startswith(b"\x89PNG")


def test_export_takes_the_best_and_can_take_the_newest(run, tmp_path):
    """Both write a model that evaluates to what its checkpoint's manifest says."""
    for flag in ([], ["--newest"]):
        folder, result = tmp_path / f"model{len(flag)}", tmp_path / f"{len(flag)}.json"
        assert main(["export", "quiet", "--to", str(folder), *flag]) == 0
        assert main(["evaluate", "--sequences", "7", str(folder), "--json", str(result)]) == 0
        stored = json.loads((folder / "config.json").read_text())["provenance"]

        assert stored["run"] == run.run_id
        assert json.loads(result.read_text())["eval/loss"] == pytest.approx(stored["held_out_loss"], rel=1e-5)


def test_an_exported_model_can_be_evaluated_on_other_text(run, tmp_path):
    """data.corpus names it; the model's own tokenizer is kept."""
    other = write_text(tmp_path / "other.txt", seed=5)
    folder, result = tmp_path / "model", tmp_path / "result.json"
    assert main(["export", "quiet", "--to", str(folder)]) == 0
    assert main(["evaluate", str(folder), f"data.corpus=text:{other}", "--json", str(result)]) == 0
    assert main(["evaluate", str(folder), "model.layers=1"]) == 2

    assert json.loads(result.read_text())["eval/loss"] > 0


def test_damaged_checkpoints_are_not_exported(run, tmp_path, capsys):
    """Both checkpoints damaged: the error names them and what is wrong."""
    store = tmp_path / "copy"
    store.mkdir()
    (store / "spec.yaml").write_text(run.spec_file.read_text())
    for folder in run.checkpoints.iterdir():
        target = store / "checkpoints" / folder.name
        target.mkdir(parents=True)
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        next(target.glob("*.distcp")).unlink()

    assert main(["export", str(store), "--to", str(tmp_path / "model")]) == 2
    assert "step-00000006 is damaged" in capsys.readouterr().err


def test_exporting_onto_something_is_refused(run, tmp_path, capsys):
    """A folder that holds files stays as it is."""
    (tmp_path / "precious").write_text("")

    assert main(["export", "quiet", "--to", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_runs_are_found_by_path_id_and_name(run):
    """A unique beginning of the id will do; the error for anything else says where was looked."""
    for name in (str(run.path), run.run_id, run.run_id[:6], "quiet"):
        assert RunFolder.find(name) == run
    with pytest.raises(UserError, match=r"did you mean quiet\?"):
        RunFolder.find("quite")


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_page_of_mlflow_opens_and_ends_quietly(run, tmp_path, number):
    """`lossworks ui` serves the embedded store on loopback, without MLflow's assistant; signals end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "import sys; from lossworks.cli import main; sys.exit(main())"
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, "ui", "--port", str(port)], stdout=log, stderr=subprocess.STDOUT
        )
    page = b""
    deadline = time.monotonic() + 60
    while not page and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as answer:
                page = answer.read()
        except OSError:
            time.sleep(0.2)
    with pytest.raises(HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/ajax-api/3.0/mlflow/assistant/providers", timeout=5)
    server.send_signal(number)

    assert server.wait(30) == 0
    assert b"<!doctype html>" in page
    assert "Traceback" not in (tmp_path / "log").read_text()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)


def test_a_run_is_held_by_one_process(run):
    """A second driver on the same run is refused as long as the first holds it."""
    with run.hold(), pytest.raises(UserError, match="another process"), run.hold():
        pass
    with run.hold():
        pass


def test_options_and_overrides_mix_in_any_order(run, capsys):
    """An override behind an option is an override."""
    assert main(["train", "steps=7", "--from-run", "quiet", "--print-spec", "model.layers=3"]) == 0
    printed = capsys.readouterr().out

    assert "steps: 7" in printed
    assert "layers: 3" in printed


def test_specs_survive_yaml_and_know_every_key(run):
    """to_yaml and read are inverse; every leaf of the flat form can be overridden."""
    spec = run.spec()

    assert type(spec).parse(spec.model_dump(mode="json")) == spec
    for key, value in spec.flat().items():
        assert spec.override([f"{key}={json.dumps(value)}"]) == spec


def test_a_nested_value_is_refused_where_a_mapping_belongs():
    """An override below a number can't be set."""
    with pytest.raises(UserError, match=r"vocab_size\.x: unknown key"):
        DataSpec().override(["vocab_size.x=1"])


def test_a_full_disk_is_one_line_that_says_what_helps(monkeypatch, capsys, tmp_path):
    """Wherever it is met, and whatever follows from it."""

    def run(_):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/model.safetensors")
        except OSError:
            raise KeyError("what comes of it")  # noqa: B904 - as a `finally` that fails, too

    full = {"full": Command("fill a disk", lambda _: None, run)}
    monkeypatch.setattr("lossworks.cli.commands", lambda: full)
    assert main(["full"]) == 1
    said = capsys.readouterr().err.splitlines()

    assert len(said) == 1
    assert "/full/model.safetensors: No space left on device" in said[0]
    assert "--resume" in said[0]


def test_tensors_that_storage_refuses_are_an_error_of_storage(monkeypatch, tmp_path):
    """The library tells it in words alone."""

    def refuse(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(OSError, match="No space left on device") as error:
        write_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    assert error.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "config",
    [
        {"provenance": {"spec": [1]}, "columns": [{"name": 1}]},
        {"provenance": {"spec": {"task": "classification"}}, "columns": [{"name": "a", "kind": "nummer"}]},
        {"provenance": "x"},
    ],
)
@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_damaged_model_folder_is_named(config, command, tmp_path, capsys):
    model, table = tmp_path / "model", tmp_path / "t.csv"
    model.mkdir()
    form = {"format": "lossworks-classifier", "format_version": 1}
    (model / "config.json").write_text(json.dumps(form | config))
    table.write_text("a,b\n1,2\n")
    assert main([command, str(model), *([str(table)] if command == "predict" else [])]) == 2
    assert str(model) in capsys.readouterr().err


def test_output_that_the_shell_has_closed_is_no_error():
    """As by ``>&-``."""
    call = "import sys; from lossworks.cli import main; sys.exit(main(['losses', 'ldr']))"
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(call)} >&-"
    ended = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)

    assert (ended.returncode, ended.stderr) == (0, "")
