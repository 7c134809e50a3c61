"""Exported regressions and multi-label models: what the run measured is what the folder predicts."""

import json

import numpy as np
import pytest
import torch

from lossworks.cli import main
from lossworks.data.label_sets import load_label_sets
from lossworks.data.values import load_values
from lossworks.errors import UserError
from lossworks.metrics.ranking import ranking_metrics, ranking_sums
from lossworks.metrics.regression import value_metrics, value_sums
from lossworks.models import load_predictor
from lossworks.tasks import parse_train_spec
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_in_folder

BINS = {"name": "hl-gauss", "v_min": -4, "v_max": 4}


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))


def exported(values, to):
    """Train, export the best checkpoint by the command line; return it and what was measured then."""
    folder = run_in_folder(values)
    assert main(["export", folder.run_id, "--to", str(to)]) == 0
    predictor = load_predictor(to)
    step = json.loads((to / "config.json").read_text())["provenance"]["step"]
    rows = [json.loads(line) for line in folder.journal.read_text().splitlines()]
    (measured,) = [row["metrics"] for row in rows if row["step"] == step and "eval/loss" in row["metrics"]]
    return predictor, measured


def as_they_came(data):
    """Return the held-out inputs before they were standardised."""
    inputs = data.held_out.inputs.numpy().astype(np.float64)
    scale = data.standardisation
    return inputs if scale is None else inputs * scale.deviation + scale.mean


@pytest.mark.parametrize("loss", ["squared-error", "quantile", BINS], ids=["squared", "quantile", "bins"])
@pytest.mark.parametrize("standardise", [True, False])
def test_a_regression_predicts_what_its_run_measured(loss, standardise, tmp_path):
    """In the targets' own unit, from examples as they come."""
    data = {"source": "friedman:80", "standardise": standardise, "standardise_targets": standardise}
    values = tiny(task="regression", loss=loss, data=data, steps=30)
    predictor, measured = exported(values, tmp_path / "model")

    own = load_values(parse_train_spec(values).data, 0)
    found = torch.from_numpy(predictor.predict(as_they_came(own)))
    truth = own.held_out.labels.double() * own.deviation + own.mean
    for name, value in value_metrics(value_sums(found, truth)).items():
        assert value == pytest.approx(measured[f"eval/{name}"], rel=1e-4)
    assert found.dtype == torch.float32
    assert predictor.predict(as_they_came(own)[:0]).shape == (0,)


@pytest.mark.parametrize("loss", ["decoupled-softmax", "soft-top-k", "binary-cross-entropy"])
def test_a_multi_label_model_ranks_as_its_run_measured(loss, tmp_path):
    """By scores of all labels, whose names are in the folder."""
    data = {"source": "topics:120", "labels": 20}
    values = tiny(task="multi-label", loss=loss, data=data)
    predictor, measured = exported(values, tmp_path / "model")

    own = load_label_sets(parse_train_spec(values).data, 0)
    scores = torch.from_numpy(predictor.predict(as_they_came(own)))
    figures = ranking_metrics(ranking_sums(scores.topk(5, dim=1).indices, own.held_out.labels))
    assert {f"eval/{name}": value for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in measured.items() if name.startswith(("eval/p", "eval/r", "eval/n"))}
    )
    assert predictor.names == own.names
    assert scores.shape == (30, 20)


def test_the_command_evaluates_what_it_exported(tmp_path, capsys):
    """The same figures, on the same held-out data, or on others."""
    values = tiny(task="regression", loss=BINS, data={"source": "friedman:80"})
    _, measured = exported(values, tmp_path / "model")
    command = ["evaluate", str(tmp_path / "model"), "--json", str(tmp_path / "figures.json")]

    assert main(command) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found == pytest.approx({name: measured[name] for name in found}, rel=1e-5)
    assert "held-out root mean squared error" in capsys.readouterr().out
    assert main([*command, "data.source=friedman:200"]) == 0
    assert json.loads((tmp_path / "figures.json").read_text()) != found


def test_what_can_not_be_read_is_refused(tmp_path):
    """Examples of another shape, classifiers, and folders that are damaged."""
    values = tiny(task="regression", loss="huber", data={"source": "friedman:40"}, steps=1)
    predictor, _ = exported(values, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())

    def refusal(**changes):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(UserError) as refused:
            load_predictor(tmp_path / "model")
        return str(refused.value)

    with pytest.raises(UserError, match=r"examples of shape \(3,\): the model was trained on \(10,\)"):
        predictor.predict(np.zeros((2, 3)))
    assert "is no exported regression or multi-label model" in refusal(format="lossworks-classifier")
    assert "format_version=9 is unknown; this Lossworks reads 1" in refusal(format_version=9)
    assert "lacks shape, outputs, loss or scales, or they are damaged" in refusal(target={"mean": "x"})
    assert "lacks shape, outputs, loss or scales, or they are damaged" in refusal(loss={})
    assert "a checkpoint of another shape" in refusal(shape=[4])
    assert "hubr" in refusal(loss={"name": "hubr"})
    with pytest.raises(UserError, match="no such file"):
        load_predictor(tmp_path / "nowhere")
