"""What can be seen of a run on a real Ray instance: metrics endpoint, logs, profile, and the dashboard."""

import json
import re
import threading
import time
import urllib.request
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from lossworks.cli import main
from lossworks.tracking import read_all
from lossworks.tracking.client import connect
from lossworks.training.measure.phases import PHASES
from lossworks_jobs.training.prometheus import EXPORTED, MEMORY, Exporter
from lossworks_jobs.training.train import train

pytestmark = pytest.mark.timeout(240)
DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana-lossworks.json"
SERIES = {name for exported in (*EXPORTED, MEMORY) for name in exported.series}
# A language model on a machine without a listed peak has neither of these.
ELSEWHERE = {"ray_lossworks_examples_per_second", "ray_lossworks_mfu"}


def scrape():
    """Return what every node of the instance answers to Prometheus."""
    import ray

    pages = []
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            pages.append(answer.read().decode())
    return "\n".join(pages)


def samples(page):
    """Return name, labels and value of every sample of ours."""
    for line in page.splitlines():
        match = re.fullmatch(r"(ray_lossworks_\w+)\{(.*)\} (\S+)", line)
        if match:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            yield match[1], labels, float(match[3])


class Watcher(threading.Thread):
    """Scrapes until all that a run exports was seen or it took too long, and then stops the run.

    Ray's workers report twice a second here, and on a busy machine the page is late: a run of so many steps
    would be too short on one machine and too long on another.

    Attributes:
        found: All values that were seen, by name and labels.
        labelled: Ids of the runs that they are labelled with.
        saw: What the last scrape gave, for whoever finds that something is missing.
    """

    def __init__(self, runs):
        super().__init__(daemon=True)
        self.runs, self.before = runs, set(runs.glob("*"))
        self.over = threading.Event()
        self.found, self.labelled, self.saw = {}, set(), "nothing was asked"

    def run(self):
        deadline = time.monotonic() + 120
        while not self.over.wait(0.25):
            try:
                page = scrape()
            except OSError as error:
                self.saw = repr(error)
            else:
                self.take(page)
            if self.complete() or time.monotonic() > deadline:
                for run in set(self.runs.glob("*")) - self.before:
                    (run / "stop").touch()

    def take(self, page):
        ours = [sample for sample in samples(page) if sample[1]["name"] == "watched"]
        self.saw = f"{len(page)} characters, {len(ours)} samples"
        self.labelled |= {labels["run"] for _, labels, _ in ours}
        for name, labels, value in ours:
            key = (name, labels["rank"], labels.get("phase"), labels.get("le"))
            self.found.setdefault(key, []).append(value)

    def complete(self):
        everything = {name for name, *_ in self.found} >= SERIES - ELSEWHERE
        return everything and ("ray_lossworks_peak_memory_bytes", "1", None, None) in self.found


CHANGES = ["name=watched", "profile=1", "evaluation.every=20", "checkpoint.every=20"]


@pytest.fixture(scope="module")
def observed(cluster, spec, session_home):
    """A run with a profile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(session_home))
        patch.delenv("RAY_ADDRESS", raising=False)
        yield train(spec.override([*CHANGES, "steps=50"]))


class Recorded:
    """Stands for a metric of Ray, whose values come out at the endpoint when Ray's agents have time.

    Attributes:
        made: All metrics, by name.
        values: What was set, added or observed, with the tags of the call.
    """

    made: ClassVar[dict[str, "Recorded"]] = {}

    def __init__(self, name, description, *arguments):
        self.values, self.tags, self.known = [], {}, arguments[-1]
        assert description
        self.made[name] = self

    def set_default_tags(self, tags):
        assert sorted(tags) == sorted(self.known)
        self.tags = tags
        return self

    def take(self, value, tags=None):
        self.values.append((value, tags))

    set = inc = observe = take


def test_a_runs_figures_are_exported(observed, monkeypatch):
    """Every metric there is gets the journal's values, with the run's id, name and rank."""
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorded)
    monkeypatch.setattr("ray.util.metrics.Counter", Recorded)
    monkeypatch.setattr("ray.util.metrics.Histogram", Recorded)
    monkeypatch.setattr(Recorded, "made", {})
    rows = [row["metrics"] for row in read_all(observed.folder.journal)]
    exporter = Exporter(run=observed.folder.run_id, name="watched", rank=0)
    for row in rows:
        exporter.record(row)
        exporter.watch({"train/peak_memory_bytes": 7.0})

    found = {name: [value for value, _ in metric.values] for name, metric in Recorded.made.items()}
    silent = {name for name, values in found.items() if not values}
    assert {f"ray_{name}" for name in silent} == ELSEWHERE
    assert found["lossworks_steps"] == [1.0] * 50
    assert found["lossworks_train_loss"] == [row["train/loss"] for row in rows]
    assert found["lossworks_held_out_loss"] == [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert found["lossworks_step_seconds"] == [row["train/step_seconds"] for row in rows]
    assert found["lossworks_peak_memory_bytes"] == [7.0] * 50
    assert {tags["phase"] for _, tags in Recorded.made["lossworks_time_share"].values} == set(PHASES)
    own = {"run": observed.folder.run_id, "name": "watched", "rank": "0"}
    assert all(own.items() <= metric.tags.items() for metric in Recorded.made.values())
    Exporter(run="another", name="watched", rank=1)
    assert Recorded.made["lossworks_peak_memory_bytes"].tags["rank"] == "1"


def test_a_name_beyond_ascii_is_exported(cluster):
    """Ray's metrics take ASCII alone, and a run may be called as its owner likes."""
    exporter = Exporter(run="another", name="Käufe №1", rank=0)
    exporter.watch({"train/peak_memory_bytes": 7.0})

    assert exporter._tags["name"] == "K\\xe4ufe \\u21161"


@pytest.fixture(scope="module")
def scraped(cluster, spec, session_home):
    """A run, and what was scraped while it went on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSWORKS_HOME", str(session_home))
        patch.delenv("RAY_ADDRESS", raising=False)
        watcher = Watcher(session_home / "runs")
        watcher.start()
        try:
            result = train(spec.override([*CHANGES, "steps=100000"]))
        finally:
            watcher.over.set()
            watcher.join(20)
        yield result, watcher


@pytest.mark.slow  # how soon the page is there is up to Ray's agents, and to what else the machine does
def test_a_runs_figures_are_at_rays_metrics_endpoint(scraped):
    """Every metric there is, with the run's id, name and rank, and values that the journal has, too."""
    result, watcher = scraped
    found = watcher.found
    rows = [row["metrics"] for row in read_all(result.folder.journal)]
    lead = ("0", None, None)

    assert result.outcome.status == "stopped"
    assert {name for name, *_ in found} == SERIES - ELSEWHERE, f"the last scrape gave {watcher.saw}"
    assert watcher.labelled == {result.folder.run_id}
    assert set(found["ray_lossworks_train_loss", *lead]) <= {row["train/loss"] for row in rows}
    assert set(found["ray_lossworks_held_out_loss", *lead]) <= {row.get("eval/loss") for row in rows}
    for name in ("ray_lossworks_steps_total", "ray_lossworks_step_seconds_count"):
        counts = found[name, *lead]
        assert counts == sorted(counts)
        assert 20 <= counts[-1] <= len(rows)
    assert {rank for name, rank, *_ in found if name == "ray_lossworks_peak_memory_bytes"} == {"0", "1"}
    assert {phase for name, _, phase, _ in found if name == "ray_lossworks_time_share"} == set(PHASES)
    waited = sum(row.get("train/checkpoint_seconds", 0) for row in rows)
    assert 0 < found["ray_lossworks_checkpoint_seconds_total", *lead][-1] < waited + 1e-6


def test_logs_and_profile_are_in_the_run_and_in_mlflow(observed, capsys):
    """A file for each rank and the driver; the profile with its pictures; all stored as artifacts."""
    from ray._private.worker import global_worker

    folder, client = observed.folder, connect(observed.folder.spec().tracking)
    logs = {file.path for file in client.list_artifacts(folder.run_id, "logs")}
    profile = {file.path for file in client.list_artifacts(folder.run_id, "profile")}
    lines = [json.loads(line) for line in (folder.logs / "rank-1.jsonl").read_text().splitlines()]

    assert logs == {"logs/driver.jsonl", "logs/rank-0.jsonl", "logs/rank-1.jsonl"}
    assert profile == {"profile/trace.json.gz", "profile/flame.svg", "profile/flame.png"}
    assert {line["rank"] for line in lines} == {1}
    said = [line["message"] for line in lines]
    assert said[:3] == ["started", "evaluated", "checkpoint written"]
    assert said[-1] == "ended"
    assert main(["logs", str(folder.path), "--rank", "0"]) == 0
    assert "rank 0: started name=watched world_size=2 device=cpu" in capsys.readouterr().out
    ray_logs = list(Path(global_worker.node.get_session_dir_path()).glob("logs/worker-*.err"))
    assert any(f"checkpoint={folder.checkpoints}" in file.read_text() for file in ray_logs)


def test_the_time_of_a_run_on_ray_includes_communication(observed):
    """Two workers exchange gradients; the seconds of all phases are those of the run."""
    seconds = observed.outcome.seconds
    steps = sum(row["metrics"]["train/step_seconds"] for row in read_all(observed.folder.journal))

    assert seconds["communication"] > 0
    assert sum(seconds.values()) > steps


def test_the_dashboard_asks_for_what_is_exported_and_for_all_of_it():
    """Names in its queries are the exporter's, and every one of those is shown somewhere."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"ray_lossworks_\w+", target["expr"])
    }

    assert asked == SERIES


def test_the_dashboard_can_be_imported():
    """Panels of their own ids and places, with units, on a data source and runs that are chosen."""
    board = json.loads(DASHBOARD.read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    panels = board["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert board["title"]
    assert isinstance(board["schemaVersion"], int)
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert variables["run"]["query"]["query"].startswith("label_values(ray_lossworks_")
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len(set(cells)) == len(cells)
    assert all(0 <= x < 24 for x, _ in cells)
    for panel in panels:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all("$run" in target["expr"] for target in panel["targets"])


@pytest.mark.parametrize(
    ("arguments", "steps"), [([], 0), (["--profile"], 3), (["--profile", "profile.steps=7"], 7)]
)
def test_profiling_is_asked_for_in_a_word(arguments, steps, capsys):
    """Three steps from the fifth, or what is said."""
    assert main(["train", "jobs/specs/digits.yaml", "--print-spec", *arguments]) == 0
    spec = yaml.safe_load(capsys.readouterr().out)

    assert spec["profile"] == {"steps": steps, "start": 5}
