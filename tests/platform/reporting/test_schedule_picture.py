"""The picture of a schedule: what it holds, and that nothing is started for it."""

import numpy as np
import pytest

from lossworks.cli import main
from lossworks.reporting.schedule_picture import learning_rates, loss_weights
from lossworks.tasks import parse_train_spec
from lossworks_jobs.training import train as training
from lossworks_testing.classification import tiny

SUM = [
    {"name": "cross-entropy", "weight": {"value": 1, "final": 0, "start": 2, "steps": 2}},
    {"name": "ldr", "weight": 0.5},
]


def test_rates_and_weights_are_those_of_training():
    """Two rates where Muon and AdamW have their own; only weights that change."""
    muon = {"kind": "muon", "lr": 0.4, "adamw_lr": 0.1}
    schedule = {"kind": "linear", "warmup_steps": 2}
    spec = parse_train_spec(tiny(optimizer=muon, schedule=schedule, loss=SUM))
    steps = np.arange(1, 7)
    rates, weights = learning_rates(spec, steps), loss_weights(spec, steps)

    factors = np.array([0.5, 1, 0.75, 0.5, 0.25, 0])
    assert list(rates) == ["muon", "adamw"]
    np.testing.assert_allclose(rates["muon"], 0.4 * factors)
    np.testing.assert_allclose(rates["adamw"], 0.1 * factors)
    assert list(weights) == ["cross-entropy"]
    np.testing.assert_allclose(weights["cross-entropy"], [1, 1, 0.5, 0, 0, 0])
    assert list(learning_rates(parse_train_spec(tiny()), steps)) == ["adamw"]


@pytest.mark.parametrize("name", ["lr.png", "lr.svg"])
def test_the_command_draws_both_files_and_ends(name, tmp_path, monkeypatch, capsys):
    def started(*_, **__):
        raise AssertionError("a training was started")

    monkeypatch.setattr(training, "train", started)
    assert main(["train", "digits", "steps=10000000", "--plot-schedule", str(tmp_path / name)]) == 0

    assert "lr.png" in capsys.readouterr().out
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "lr.svg").read_text()
    assert "digits: adamw, cosine, 10,000,000 steps" in text
    for label in ("learning rate", "step"):
        assert f"<!-- {label} -->" in text


@pytest.mark.parametrize(
    ("name", "why"), [("lr.jpg", "must end with .png or .svg"), ("nowhere/lr.png", "there is no folder")]
)
def test_another_name_is_refused(name, why, tmp_path, capsys):
    assert main(["train", "digits", "--plot-schedule", str(tmp_path / name)]) == 2
    assert why in capsys.readouterr().err
