"""Many processes that write runs to one server, and the count of what arrived."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from lossworks.errors import RunError
from lossworks.specs import TrackingSpec
from lossworks.tracking import Follower, Journal, create_run, deliver, finish_run
from lossworks.tracking.client import connect
from lossworks_testing.forkserver import forkserver

NAMES = ("train/loss", "eval/loss")


def value(writer: int, step: int, name: str) -> float:
    """Return what a writer writes: a number of its own for every point, NaN now and then."""
    return math.nan if step % 997 == 0 else writer * 1e6 + step + (0.5 if name == "eval/loss" else 0.0)


@dataclass(frozen=True)
class Writing:
    """What every writer does.

    Attributes:
        uri: The server.
        folder: Holds one folder a writer, in which a file ``run`` will have the run's id.
        writers: How many.
        steps: Rows that each writes, of two metrics.
        seconds: That the writing takes.
        variables: Environment variables.
        start: Time at which all create their runs.
    """

    uri: str
    folder: Path
    writers: int
    steps: int
    seconds: float
    variables: dict[str, str]
    start: float


def write_run(plan: Writing, writer: int) -> None:
    """Write one run through journal and follower, and deliver later what the server missed."""
    os.environ.update(plan.variables)
    spec = TrackingSpec(uri=plan.uri, experiment="soak", system_metrics=False, patience_s=0.0)
    connect(spec)  # imports MLflow, so that the runs are created at one moment
    time.sleep(max(0.0, plan.start - time.time()))
    run_id = create_run(spec, name=f"writer {writer}", parameters={"writer": writer}, tags={})
    path = plan.folder / str(writer)
    (path / "run").write_text(run_id)
    began = time.monotonic()
    with Journal.open(path / "metrics.jsonl") as journal, Follower(spec, run_id, journal.path):
        for step in range(1, plan.steps + 1):
            journal.write(step, {name: value(writer, step, name) for name in NAMES})
            time.sleep(max(0.0, began + plan.seconds * step / plan.steps - time.monotonic()))
    persist(lambda: deliver(spec, run_id, path / "metrics.jsonl"))
    persist(lambda: finish_run(spec, run_id, "FINISHED"))


def persist(work: Callable[[], object], *, patience_s: float = 300.0) -> None:
    """Do what needs the server, as `lossworks sync` does when somebody calls it again and again."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            work()
        except RunError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


def start_writers(plan: Writing) -> list[BaseProcess]:
    """Start the writers; all create their runs, in one new experiment, at the same moment."""
    context = forkserver()
    processes = []
    for writer in range(plan.writers):
        (plan.folder / str(writer)).mkdir(parents=True)
        processes.append(context.Process(target=write_run, args=(plan, writer), daemon=True))
        processes[-1].start()
    return processes


def all_end_well(processes: list[BaseProcess], *, timeout_s: float) -> bool:
    """Wait for the writers and return whether none failed; what they said is on stderr."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(1.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    return all(process.exitcode == 0 for process in processes)


def count_points(plan: Writing) -> dict[str, int]:
    """Count over the server's API the points that are lost, doubled, or have a wrong value.

    Returns:
        ``points`` that are there, ``lost``, ``doubled`` and ``wrong``, ``runs`` of the experiment, and
        ``experiments`` of that name.
    """
    client = connect(TrackingSpec(uri=plan.uri))
    found = dict.fromkeys(("points", "lost", "doubled", "wrong"), 0)
    for writer in range(plan.writers):
        run_id = (plan.folder / str(writer) / "run").read_text()
        for name in NAMES:
            history = client.get_metric_history(run_id, name)
            points = {point.step: point.value for point in history}
            expected = {step: value(writer, step, name) for step in range(1, plan.steps + 1)}
            found["points"] += len(history)
            found["doubled"] += len(history) - len(points)
            found["lost"] += len(expected.keys() - points.keys())
            found["wrong"] += sum(not _same(points[step], expected.get(step)) for step in points)
    experiments = [item for item in client.search_experiments() if item.name == "soak"]
    runs = client.search_runs([item.experiment_id for item in experiments], max_results=1000)
    return {**found, "runs": len(runs), "experiments": len(experiments)}


def _same(value: float, expected: float | None) -> bool:
    return expected is not None and (value == expected or (math.isnan(value) and math.isnan(expected)))
