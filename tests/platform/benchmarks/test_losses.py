"""``lossworks bench losses`` measures losses beside cross-entropy, and steps beside the dense ones."""

import json

import pytest
import torch

from lossworks.benchmarks.losses_worker import dense_step, measure_loss
from lossworks.cli import main
from lossworks.entries.losses.classification.factored_head import FactoredHead
from lossworks.losses import create

TINY = ["bench", "losses", "shape=64x600x32", "classes=50,100", "step_rows=8", "step_features=16"]


def test_the_table_has_losses_and_steps(tmp_path):
    """In real processes; every figure is there and positive where it must be."""
    path = tmp_path / "figures.json"
    assert main([*TINY, "losses=comp-sum", "--repeats", "3", "--json", str(path)]) == 0

    rows = {(row["method"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]}
    assert rows["comp-sum", "over cross-entropy"] > 0
    assert rows["comp-sum", "extra memory"] >= 0
    assert rows["50 classes", "over the fewest classes"] == 1
    assert rows["100 classes", "dense step"] > 0


@pytest.mark.parametrize("slug", ["aldr-kl", "dco"])
def test_losses_that_need_settings_or_sequences_are_measured_too(slug):
    """One without its normalisation, one on rows cut into sequences."""
    case = {"slug": slug, "n": 64, "v": 60, "d": 8, "seed": 0, "repeats": 1}

    assert measure_loss(case)["loss_s"] > 0


def test_both_steps_are_the_same():
    """What is timed beside the factored step is that very step."""
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(9, 4, generator=g), torch.randn(5, 4, generator=g)
    targets, loss = torch.tensor([0, 8, 8, 2, 1]), create("spherical-z-loss")
    head = FactoredHead(weight.clone(), loss)

    expected = dense_step(weight, hidden, targets, loss)

    torch.testing.assert_close(head.step(hidden, targets, 0.01)[1], expected)
    torch.testing.assert_close(head.weight(), weight.detach())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("losses=ldx", "ldx: no such loss without logits; did you mean ldr?"),
        ("losses=dco-step", "dco-step: no such loss without logits"),
        ("shape=64x64", "'64x64' must be NxVxD"),
    ],
)
def test_a_wrong_setting_is_refused(override, message, capsys):
    """Before anything runs."""
    assert main(["bench", "losses", override]) == 2
    assert message in capsys.readouterr().err
