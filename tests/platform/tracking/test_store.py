import subprocess
import sys
import time
from pathlib import Path

import pytest

from lossworks.errors import RunError, UserError
from lossworks.specs import TrackingSpec
from lossworks.tracking import create_run, finish_run, machine, open_run
from lossworks.tracking.client import connect

CREATE = """
from lossworks.specs import TrackingSpec
from lossworks.tracking import create_run
print(create_run(TrackingSpec(), name="x", parameters={"a": 1}, tags={}))
"""


def new_run(spec, name="train", **values):
    return create_run(
        spec, name=name, parameters=values.pop("parameters", {}), tags=values.pop("tags", {}), **values
    )


def test_a_run_has_its_parameters_tags_and_parent(spec):
    parent = new_run(spec, "parent")
    parameters = {f"group.value{index}": index for index in range(230)} | {"long": "x" * 7000, "none": None}

    run_id = new_run(spec, "child", parameters=parameters, tags={"mine": "yes"}, parent=parent)

    run = connect(spec).get_run(run_id)
    assert len(run.data.params) == 232
    assert run.data.params["group.value229"] == "229"
    assert len(run.data.params["long"]) == 6000
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "child"
    expected = {"mine": "yes", "mlflow.parentRunId": parent, "lossworks.version.lossworks": "0.1.0"}
    assert expected.items() <= run.data.tags.items()
    assert {
        "lossworks.machine.cpu",
        "lossworks.version.torch",
        "lossworks.version.mlflow",
    } <= run.data.tags.keys()


def test_the_git_commit_is_a_tag_where_there_is_one(spec, tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    without = connect(spec).get_run(new_run(spec)).data.tags
    git = ["git", "-c", "user.name=n", "-c", "user.email=n@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (repository / "file").write_text("1")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    clean = connect(spec).get_run(new_run(spec)).data.tags
    (repository / "file").write_text("2")
    dirty = connect(spec).get_run(new_run(spec)).data.tags

    assert "mlflow.source.git.commit" not in without
    assert len(clean["mlflow.source.git.commit"]) == 40
    assert (clean["lossworks.git.dirty"], dirty["lossworks.git.dirty"]) == ("false", "true")


def test_artifacts_of_the_embedded_store_lie_in_the_home_folder(spec, home, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "model").mkdir(parents=True)
    (elsewhere / "model" / "weights").write_text("w")
    (elsewhere / "spec.yaml").write_text("a: 1")
    monkeypatch.chdir(elsewhere)
    run_id = new_run(spec)

    finish_run(spec, run_id, "FINISHED", artifacts=[Path("spec.yaml"), Path("model")], tags={"more": "tags"})

    run = connect(spec).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["more"] == "tags"
    stored = {path.name for path in (home / "artifacts").rglob("*") if path.is_file()}
    assert stored == {"weights", "spec.yaml"}
    assert {path.name for path in elsewhere.iterdir()} == {"model", "spec.yaml"}


def test_artifacts_go_through_a_server(server_spec, server, tmp_path):
    (tmp_path / "report.png").write_bytes(b"png")
    run_id = new_run(server_spec)

    finish_run(server_spec, run_id, "FINISHED", artifacts=[tmp_path / "report.png"])

    assert [path.name for path in (server.folder / "artifacts").rglob(f"*{run_id}/artifacts/*")] == [
        "report.png"
    ]


def test_a_failed_run_says_why_until_it_is_opened_again(spec):
    run_id = new_run(spec)
    finish_run(spec, run_id, "FAILED", reason="the loss became NaN at step 7")
    failed = connect(spec).get_run(run_id)

    open_run(spec, run_id)

    again = connect(spec).get_run(run_id)
    assert failed.info.status == "FAILED"
    assert failed.data.tags["lossworks.reason"] == "the loss became NaN at step 7"
    assert again.info.status == "RUNNING"
    assert "lossworks.reason" not in again.data.tags


def test_a_missing_artifact_is_an_error_but_the_run_ends(spec, tmp_path):
    run_id = new_run(spec)

    with pytest.raises(RunError, match=r"nowhere\.png"):
        finish_run(spec, run_id, "FINISHED", artifacts=[tmp_path / "nowhere.png"])

    assert connect(spec).get_run(run_id).info.status == "FINISHED"


def test_opening_a_run_that_is_not_there_names_run_and_store(spec, home):
    with pytest.raises(UserError, match=rf"run {'0' * 32}: is not in sqlite:///{home}"):
        open_run(spec, "0" * 32)
    with pytest.raises(UserError, match="is not in"):
        open_run(spec, "no id at all")


def test_nothing_is_created_by_opening(home):
    with pytest.raises(UserError, match="holds no runs yet"):
        open_run(TrackingSpec(), "0" * 32)

    assert list(home.iterdir()) == []


def test_a_deleted_experiment_is_a_user_error(spec):
    new_run(spec)
    client = connect(spec)
    client.delete_experiment(client.get_experiment_by_name("lossworks").experiment_id)

    with pytest.raises(UserError, match="was deleted"):
        new_run(spec)


def test_four_drivers_may_start_at_once_on_a_fresh_home_and_stay_quiet(home):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CREATE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    answers = [process.communicate(timeout=240) for process in processes]

    assert [error for _, error in answers] == [""] * 4
    ids = [output.strip() for output, _ in answers]
    assert len(set(ids)) == 4
    assert all(connect(TrackingSpec()).get_run(run_id).data.params == {"a": "1"} for run_id in ids)
    assert len(connect(TrackingSpec()).search_experiments()) == 2  # MLflow's default one, and ours


def test_a_driver_killed_while_it_creates_the_store_leaves_nothing_that_hinders(home):
    process = subprocess.Popen([sys.executable, "-c", CREATE], stdout=subprocess.DEVNULL)
    partial = home / "mlflow.db.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial.exists()
    assert not (home / "mlflow.db").exists()

    run_id = new_run(TrackingSpec())

    assert connect(TrackingSpec()).get_run(run_id).info.status == "RUNNING"
    assert {path.name for path in home.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_the_machine_is_described():
    facts = machine(gpus=["A"])

    assert facts.keys() == {"cpu", "cores", "memory_gib", "platform", "python", "gpus"}
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["memory_gib"] > 0
    assert facts["gpus"] == ["A"]
