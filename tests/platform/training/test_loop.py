"""The training loop in one process: what it leaves, and what it does when something goes wrong."""

import math

import pytest
import torch

from lossworks.tasks.text.language_model import TrainSpec
from lossworks_testing.training import VOCABULARY, losses, run_training, tiny_spec


def one_process(spec: TrainSpec, corpus, folder, **options):
    return run_training(spec.model_dump(mode="json"), corpus, str(folder), **options)


def test_a_run_learns_and_says_how_it_ended(text, corpus, tmp_path):
    """The loss starts near ln V, falls, and the outcome names checkpoint, metrics and the head's memory."""
    spec = tiny_spec(
        text, steps=60, optimizer={"lr": 0.02}, evaluation={"every": 20}, checkpoint={"every": 30}
    )
    result = one_process(spec, corpus, tmp_path)
    curve = losses(result)

    assert curve[0] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert curve[-1] < curve[0] - 1.5
    assert result["status"] == "finished"
    assert result["step"] == 60
    assert [step for step, metrics in result["rows"] if "eval/loss" in metrics] == [20, 30, 40, 60]
    assert result["metrics"]["eval/perplexity"] == pytest.approx(math.exp(result["metrics"]["eval/loss"]))
    assert result["head_memory"]["linear cross-entropy"] < result["head_memory"]["with logits"]


def test_bits_per_byte_counts_the_bytes_of_the_targets(text, corpus, tmp_path):
    """Loss in nats times tokens over ln 2 times bytes; bytes are at least the tokens."""
    _, metrics = one_process(tiny_spec(text, steps=1), corpus, tmp_path)["rows"][0]
    bytes_per_token = metrics["train/loss"] / math.log(2) / metrics["train/bits_per_byte"]

    assert 1.0 < bytes_per_token < 8.0


def test_the_same_spec_gives_the_same_bits(text, corpus, tmp_path):
    """Two runs of one spec agree exactly, and another seed does not."""
    first, second = (one_process(tiny_spec(text), corpus, tmp_path / name) for name in "ab")
    other = one_process(tiny_spec(text, seed=1), corpus, tmp_path / "c")

    assert losses(first) == losses(second)
    assert losses(first) != losses(other)


def test_stopping_and_going_on_equals_no_interruption(text, corpus, tmp_path):
    """A run stopped after step 4, in mid-epoch and between checkpoints, ends with the same bits."""
    spec = tiny_spec(text, steps=8)
    whole = one_process(spec, corpus, tmp_path / "whole")
    stopped = one_process(spec, corpus, tmp_path / "parts", stop_after=4)
    rest = one_process(spec, corpus, tmp_path / "parts")

    assert stopped["status"] == "stopped"
    assert [step for step, _ in rest["rows"]] == [5, 6, 7, 8]
    assert losses(stopped) + losses(rest) == losses(whole)
    assert rest["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    assert rest["notices"] == ["going on from step 4"]


def test_a_truncated_checkpoint_is_passed_over(text, corpus, tmp_path):
    """The run goes on from the checkpoint before, says so, and ends as if nothing had happened."""
    spec = tiny_spec(text, steps=9)
    whole = one_process(spec, corpus, tmp_path / "whole")
    one_process(spec, corpus, tmp_path / "parts", stop_after=6)
    shard = next((tmp_path / "parts" / "step-00000006").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    rest = one_process(spec, corpus, tmp_path / "parts")

    assert len(rest["notices"]) == 1
    assert "step-00000006 is damaged" in rest["notices"][0]
    assert "going on from step 3" in rest["notices"][0]
    assert losses(rest) == losses(whole)[3:]


def test_checkpoints_keep_the_newest_and_the_best(text, corpus, tmp_path):
    """Of nine checkpoints the two newest stay, and the one with the least held-out loss."""
    spec = tiny_spec(
        text, steps=9, optimizer={"lr": 0.5}, checkpoint={"every": 1, "keep": 2}, evaluation={"every": 1}
    )
    result = one_process(spec, corpus, tmp_path)
    held_out = {step: metrics["eval/loss"] for step, metrics in result["rows"]}
    best = min(held_out, key=held_out.get)

    assert {path.name for path in tmp_path.iterdir()} == {f"step-{n:08d}" for n in {8, 9, best}}
    assert result["best"].endswith(f"step-{best:08d}")


def test_a_checkpoint_between_evaluations_claims_no_held_out_loss(text, corpus, tmp_path):
    """A run stopped at step 4 saves there; its last evaluation, at step 3, is not that checkpoint's."""
    result = one_process(tiny_spec(text, checkpoint={"every": 100}), corpus, tmp_path, stop_after=4)

    assert result["checkpoint"].endswith("step-00000004")
    assert result["best"] is None


@pytest.mark.gpu
def test_a_gpu_follows_the_curve_of_a_cpu(text, corpus, tmp_path, monkeypatch):
    """The same spec gives the same losses on both, within float32's rounding."""
    on_gpu = one_process(tiny_spec(text), corpus, tmp_path / "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = one_process(tiny_spec(text), corpus, tmp_path / "cpu")

    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_step(text, corpus, tmp_path, monkeypatch):
    """NaN names the step, the rank and the last good checkpoint, and changes no parameter."""
    from lossworks.losses.objective import Objective

    calls = iter(range(1000))
    plain = Objective.forward

    def breaks(*arguments, **options):
        loss = plain(*arguments, **options)
        return loss * math.nan if torch.is_grad_enabled() and next(calls) == 4 else loss

    monkeypatch.setattr(Objective, "forward", breaks)
    result = one_process(tiny_spec(text), corpus, tmp_path)

    assert result["status"] == "diverged"
    assert "loss became NaN or infinite at step 5 on rank 0" in result["reason"]
    assert f"last good checkpoint is {tmp_path / 'step-00000003'}" in result["reason"]
    assert [step for step, _ in result["rows"]] == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_names_the_parameter(text, corpus, tmp_path, monkeypatch):
    """A finite loss with a NaN gradient is caught, too."""
    from lossworks.tasks.text import tokens as language

    def poisoned(*arguments, **options):
        model = build(*arguments, **options)
        dict(model.named_parameters())[name].register_hook(lambda grad: grad * math.nan)
        return model

    build = language.build_model
    name = next(n for n, _ in build(tiny_spec(text).model, vocab_size=300, seed=0).named_parameters())
    monkeypatch.setattr(language, "build_model", poisoned)
    result = one_process(tiny_spec(text), corpus, tmp_path)

    assert result["status"] == "diverged"
    assert f"gradient ({name}) became NaN or infinite at step 1 on rank 0" in result["reason"]
    assert "there is no checkpoint yet" in result["reason"]
