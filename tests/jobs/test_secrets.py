"""No password or token is written by a run; the other promises of docs/security.md are tested in tests/."""

import secrets
from pathlib import Path

import pytest

from lossworks.benchmarks.equivalence.trainings import write_text
from lossworks.reporting import TrainProgress
from lossworks_jobs.training.run_summary import print_run
from lossworks_jobs.training.train import train
from lossworks_testing.training import tiny_spec


def holding(folder: Path, text: str) -> set[str]:
    """Return the names of the files below a folder that hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name for path in files if text.encode() in path.read_bytes()}


@pytest.mark.timeout(240)
def test_no_secret_is_written(cluster, home, tmp_path, monkeypatch, capfd):
    """A run leaves no password or token in its folder, in MLflow's database or in what it prints."""
    planted = {name: secrets.token_hex(16) for name in ("MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN")}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    text = write_text(tmp_path / "text.txt")
    spec = tiny_spec(text, name=secrets.token_hex(16), steps=2, tracking={"system_metrics": False})
    with TrainProgress(spec.steps, first_step=0) as progress:
        result = train(spec, progress=progress)
    print_run(spec, result, seconds_before=0.0)
    printed = "".join(capfd.readouterr())

    # The name is found where it belongs, so a secret there would be found, too.
    assert {"spec.yaml", "mlflow.db"} <= holding(home, spec.name)
    assert spec.name in printed
    for value in planted.values():
        assert holding(home, value) == set()
        assert value not in printed
