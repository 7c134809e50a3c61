"""A finished run as a person sees it: MLflow's pages in a real browser, behind a password."""

import pytest

from lossworks.reporting.finish import finish_run_folder
from lossworks.runs import RunFolder
from lossworks.tasks import parse_train_spec
from lossworks.tracking import Follower, Journal, check_tracking, create_run
from lossworks.tracking.client import connect
from lossworks.training.checkpoints.checkpoint import CheckpointStore
from lossworks.training.loop import Job, train
from lossworks_testing.browser import browser, chromium
from lossworks_testing.classification import tiny
from lossworks_testing.server import TeamServer


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose administrator we are."""
    server = TeamServer(tmp_path / "server", "--workers", "1")
    server.start()
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    for name, value in server.administrator().items():
        monkeypatch.setenv(name, value)
    yield server
    server.kill()


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="chromium is not installed (Debian: apt install chromium)")
def test_the_pages_show_curves_artifacts_and_the_registered_model(server, tmp_path):
    """What a run writes through the server is what its pages show."""
    tracking = {"uri": server.uri, "register": "wines"}
    spec = parse_train_spec(tiny(name="pages", tracking=tracking))
    check_tracking(spec.tracking)
    run_id = create_run(spec.tracking, name=spec.name, parameters=spec.flat(), tags={})
    folder = RunFolder.create(spec, run_id)
    with Journal.open(folder.journal) as journal, Follower(spec.tracking, run_id, folder.journal):
        store = CheckpointStore(folder.checkpoints, keep=2)
        train(Job(spec=spec, corpus=None, checkpoints=store, record=journal.write)).write(folder.outcome_file)
    finish_run_folder(folder, None, status="FINISHED", reason=None, notify=pytest.fail)
    experiment = connect(spec.tracking).get_run(run_id).info.experiment_id
    page = f"{server.uri}/#/experiments/{experiment}/runs/{run_id}"

    shown = {}
    with browser(tmp_path) as chrome:
        chrome.log_in(*server.administrator().values())
        for path, awaited in {
            "": ["train/loss", "eval/accuracy", "wines"],
            "/model-metrics": ["pages (eval/accuracy)", "pages (eval/loss)"],
            "/artifacts": ["outcome.json", "report.png", "spec.yaml"],
        }.items():
            text = chrome.show(page + path, awaited)
            chrome.picture(tmp_path / f"page{len(shown)}.png")
            shown[path] = [part for part in awaited if part not in text]

    assert shown == {"": [], "/model-metrics": [], "/artifacts": []}
    assert all((tmp_path / f"page{index}.png").stat().st_size > 10_000 for index in range(3))
