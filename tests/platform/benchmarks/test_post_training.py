"""``lossworks bench post-training`` measures one thing in several ways, and says what is not here."""

import json

import pytest
import torch

from lossworks.benchmarks.post_training.trained_losses import (
    JOBS,
    POST_TRAINING_METHODS,
    make_post_training_inputs,
)
from lossworks.cli import main

TINY = ["bench", "post-training", "classes=300", "rows=64", "width=16", "--repeats", "1"]


@pytest.mark.parametrize("job", JOBS)
def test_all_ways_have_one_value_and_gradient(job):
    """As the dense formulas in float64; peers that are installed among them."""
    x = make_post_training_inputs(job, 128, 200, 16, seed=0)
    wide = make_post_training_inputs(job, 128, 200, 16, seed=0)
    for name in ("e", "c", "reference", "teacher_e", "teacher_c"):
        tensor = getattr(wide, name).detach().double()
        object.__setattr__(wide, name, tensor.requires_grad_(name in ("e", "c")))
    exact = POST_TRAINING_METHODS["dense"].losses[job](wide)
    slopes = torch.autograd.grad(exact, (wide.e, wide.c))
    for method in POST_TRAINING_METHODS.values():
        if method.reason_against(job) is None:
            found = method.losses[job](x)
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
            for one, right in zip(torch.autograd.grad(found, (x.e, x.c)), slopes, strict=True):
                torch.testing.assert_close(one.double(), right, rtol=1e-3, atol=1e-6)


def test_the_table_has_every_way_with_its_figures_or_the_reason(tmp_path, monkeypatch, capsys):
    """A broken peer and ours, in real processes; a run that was cut short goes on."""
    peer = tmp_path / "liger_kernel"
    peer.mkdir()
    (peer / "__init__.py").write_text("raise RuntimeError('no kernel for this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "figures.json"
    arguments = [*TINY, "jobs=dpo", "methods=ours,liger-kernel", "--json", str(file)]
    assert main(arguments) == 0
    assert main([*arguments, "--go-on"]) == 0

    rows = json.loads(file.read_text())["rows"]
    figures = {(row["metric"], row["unit"]): row["value"] for row in rows if row["method"] == "lossworks"}
    assert {row["case"] for row in rows} == {"dpo, 2 x 64 x 300 x 16, fp32, 2 threads"}
    assert figures["loss+gradients", "x plain CE"] > 0
    assert figures["extra memory", "MiB"] >= 0
    assert 0 < figures["loss", "nats"] < 30
    assert [row["note"] for row in rows if "note" in row] == [
        "failed: RuntimeError: no kernel for this machine"
    ]
    assert "no kernel for this machine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rows=100", "must be a multiple of 64, the tokens of an answer"),
        ("jobs=ppo", "jobs"),
        ("width=0", "width"),
    ],
)
def test_what_cannot_be_measured_is_refused(override, words, capsys):
    assert main([*TINY, override]) == 2
    assert words in capsys.readouterr().err
