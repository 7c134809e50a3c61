"""Methods in a training: what they are asked and when, what they change, and what stays after a resume."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lossworks.entries.methods.correctness_aware import Calibrator
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.training.checkpoints.checkpoint import tensors_in
from lossworks_testing.classification import tiny
from lossworks_testing.offered import Recorder, offer, run_offered
from lossworks_testing.training import losses, run_training


def test_hooks_are_called_in_order(tmp_path, monkeypatch):
    """Once at the start, for each micro-batch and step, and at the end; figures and results are kept."""
    offer(monkeypatch, Recorder)
    values = tiny(steps=2, batch_size=10, micro_batch_size=6, methods=["recorder"], evaluation={"every": 9})
    result = run_training(values, None, str(tmp_path))
    step = ["batch of 6 at {}", "batch of 4 at {}", "loss", "loss", "gradients at {}", "after_step {}"]

    assert Recorder.last.calls == [
        "start of classification",
        *(call.format(number) for number in (1, 2) for call in step),
        "finish",
    ]
    assert result["rows"][-1] == (2, {"recorder/total": 2.0})
    assert result["metrics"]["recorder/total"] == 2.0
    assert load_file(tmp_path / "methods" / "recorder.safetensors")["total"] == 2.0


def test_what_a_method_does_to_gradients_counts(tmp_path, monkeypatch):
    """The norm is that of the changed gradients."""
    offer(monkeypatch, Recorder)
    plain = run_training(tiny(steps=1), None, str(tmp_path / "plain"))
    tripled = tiny(steps=1, methods=[{"name": "recorder", "factor": 3}])
    changed = run_training(tripled, None, str(tmp_path / "changed"))

    norms = [result["metrics"]["train/grad_norm"] for result in (plain, changed)]
    assert norms[1] == pytest.approx(3 * norms[0], rel=1e-5)


def test_a_methods_state_survives(tmp_path):
    """The curve goes on to the last digit; a run that was stopped has finished nothing."""
    values = tiny(methods=["recorder"])
    (whole,) = run_offered([(values, str(tmp_path / "whole"))])
    (stopped,) = run_offered([(values, str(tmp_path / "parts"))], stop_after=4)
    (rest,) = run_offered([(values, str(tmp_path / "parts"))])

    assert "recorder/total" not in stopped["metrics"]
    assert losses(stopped) + losses_of_steps(rest) == losses_of_steps(whole)
    assert rest["metrics"]["recorder/total"] == 6.0
    assert tensors_in(Path(rest["checkpoint"]), "methods.recorder.")["total"] == 6.0


def losses_of_steps(result):
    """Return the training losses; the last row is what the methods found."""
    return [metrics["train/loss"] for _, metrics in result["rows"] if "train/loss" in metrics]


def test_an_attack_of_no_weight_is_plain_training(tmp_path):
    """At ν = 0, τ = 1 and ρ = 1 smooth adversarial comp-sum is cross-entropy, also beside other draws."""
    noisy = {"data": {"source": "wine", "label_noise": 0.2}}
    method = {"name": "smooth-adversarial-comp-sum", "nu": 0, "rho": 1, "tau": 1}
    plain, same, attacked = (
        run_training(tiny(**noisy, methods=methods), None, str(tmp_path / str(number)))
        for number, methods in enumerate(([], [method], ["smooth-adversarial-comp-sum"]))
    )

    assert losses(same) == pytest.approx(losses(plain), rel=1e-5)
    assert same["metrics"]["eval/loss"] == pytest.approx(plain["metrics"]["eval/loss"], rel=1e-5)
    assert all(ours > theirs for ours, theirs in zip(losses(attacked), losses(plain), strict=True))


def test_an_attack_is_not_taken_for_dropout(tmp_path):
    """A ball of no radius costs nothing, though the model draws a mask: all runs of a step have the same."""
    common = {"model": {"width": 16, "dropout": 0.5}}
    point = [{"name": "smooth-adversarial-comp-sum", "radius": 0.0, "nu": nu} for nu in (0.0, 100.0)]
    clean, weighted = (
        run_training(tiny(**common, methods=[method]), None, str(tmp_path / str(method["nu"])))
        for method in point
    )

    assert losses(weighted) == pytest.approx(losses(clean), rel=1e-3)


def test_an_attack_makes_a_model_harder_to_attack(tmp_path):
    """Inputs moved against the trained model raise its loss by less; a seed gives the same again."""
    method = {"name": "smooth-adversarial-comp-sum", "radius": 0.3, "steps": 3, "nu": 2.0}
    values = tiny(steps=60, checkpoint={"every": 60}, methods=[method])
    first, again = (run_training(values, None, str(tmp_path / name)) for name in "ab")
    plain = run_training(tiny(steps=60), None, str(tmp_path / "plain"))

    assert losses(first) == losses(again)
    assert 3 * rise(first, values) < rise(plain, values)


def rise(result, values):
    """Return by how much the held-out loss rises when each input moves by 0.3 along the gradient's sign."""
    from lossworks.tasks.registry import task_of

    spec = parse_train_spec(values)
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    model.load_state_dict(tensors_in(Path(result["checkpoint"]), "model."))
    batch = task.held_out.batch(torch.arange(len(task.held_out)).numpy())
    x = batch["inputs"].requires_grad_()
    before = torch.nn.functional.cross_entropy(model.logits(x), batch["targets"])
    (gradient,) = torch.autograd.grad(before, x)
    with torch.no_grad():
        moved = model.logits(x + 0.3 * gradient.sign())
        return float(torch.nn.functional.cross_entropy(moved, batch["targets"]) - before)


def test_a_calibrator_is_fitted_after_training_and_kept(tmp_path):
    """Figures before and after; its tensors are those of a calibrator."""
    method = {"name": "correctness-aware", "epochs": 300, "lr": 0.01}
    values = tiny(
        steps=150,
        checkpoint={"every": 150},
        data={"source": "blobs:1000"},
        model={"width": 64},
        methods=[method],
    )
    result = run_training(values, None, str(tmp_path))
    kept = load_file(tmp_path / "methods" / "correctness-aware.safetensors")
    figures = {name: value for name, value in result["metrics"].items() if name.startswith("calibration/")}

    calibrator = Calibrator(3, 4, 5, (0.1, 10.0))
    calibrator.load_state_dict(kept)
    assert set(figures) == {
        f"calibration/{figure}{when}" for when in ("", "_before") for figure in ("ece", "top1_brier", "auroc")
    }
    assert all(0 <= value <= 1 for value in figures.values())
    assert figures["calibration/ece"] < figures["calibration/ece_before"] - 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["ldr"]}, "ldr: is one of the losses, not of the methods; name it in loss: [ldr]"),
        ({"methods": ["smooth-adv"]}, "smooth-adv: no such method; did you mean smooth-adversarial-comp-sum"),
        ({"methods": ["correctness-aware"] * 2}, "names correctness-aware twice"),
        ({"methods": ["recordr"]}, "recordr: no such"),
        ({"methods": [{"name": "correctness-aware", "k": 0}]}, "correctness-aware: k=0 must be"),
        (
            {"methods": ["smooth-adversarial-comp-sum"], "sharding": "fsdp"},
            "runs the model several times: sharding=fsdp must be ddp or none",
        ),
        (
            {"methods": ["smooth-adversarial-comp-sum"], "loss": ["ldr", "comp-sum"]},
            "takes the place of the loss, which must be one and no sum",
        ),
        (
            {
                "task": "regression",
                "loss": "squared-error",
                "data": {"source": "friedman:40"},
                "methods": ["correctness-aware"],
            },
            "correctness-aware calibrates classifiers, not task=regression",
        ),
    ],
)
def test_what_a_run_can_not_have_is_refused(values, message):
    """Before anything starts, in words."""
    with pytest.raises(UserError) as refused:
        parse_train_spec({**tiny(), **values})
    assert message in str(refused.value)
