"""Classifiers go through the training loop of language models: the same resume, ranks and divisions."""

import pytest

from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec, read_train_spec
from lossworks.tasks.classification import ClassifierSpec
from lossworks.tasks.text.language_model import TrainSpec
from lossworks_testing.classification import tiny
from lossworks_testing.ranks import run_ranks
from lossworks_testing.training import losses, run_training


def test_it_learns_and_is_measured_by_the_yardsticks(tmp_path):
    """Whatever loss trains; with another loss its value is apart from cross-entropy."""
    plain = run_training(tiny(steps=60), None, str(tmp_path / "plain"))
    other = run_training(tiny(steps=60, loss="ldr"), None, str(tmp_path / "other"))

    for result in (plain, other):
        assert result["status"] == "finished"
        assert result["metrics"]["eval/accuracy"] > 0.9
        assert 0 <= result["metrics"]["eval/ece"] <= 1
        assert result["metrics"]["train/examples_per_second"] > 0
        assert sum(result["pictured"]["reliability"]["examples"]) == 45
    assert plain["metrics"]["eval/loss"] == pytest.approx(plain["metrics"]["eval/cross_entropy"], rel=1e-5)
    assert other["metrics"]["eval/loss"] < 0 < other["metrics"]["eval/cross_entropy"]


def test_going_on_equals_no_interruption(tmp_path):
    """After a stop at step 3, with dropout: the very same curve and figures."""
    values = tiny(model={"width": 16, "dropout": 0.3}, data={"source": "wine", "label_noise": 0.2})
    whole = run_training(values, None, str(tmp_path / "whole"))
    first = run_training(values, None, str(tmp_path / "parts"), stop_after=3)
    second = run_training(values, None, str(tmp_path / "parts"))

    assert first["status"] == "stopped"
    assert losses(first) + losses(second) == losses(whole)
    for name in ("eval/loss", "eval/accuracy", "eval/ece", "eval/brier"):
        assert second["metrics"][name] == whole["metrics"][name]


def test_two_ranks_give_what_one_gives(tmp_path):
    """With micro-batches, a held-out set that does not divide, replicas and split parameters."""
    one = run_training(tiny(), None, str(tmp_path / "one"))
    for kind in ("ddp", "fsdp"):
        values = tiny(workers=2, sharding={"kind": kind}, micro_batch_size=4)
        (tmp_path / f"{kind}-results").mkdir()
        two = run_ranks(
            2, run_training, values, None, str(tmp_path / kind), folder=tmp_path / f"{kind}-results"
        )[0]

        assert losses(two) == pytest.approx(losses(one), rel=1e-4)
        for name in ("eval/loss", "eval/accuracy", "eval/brier"):
            assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4)


def test_bags_stay_whole_on_uneven_ranks(tmp_path):
    """Three bags on two ranks, with the share at once: no row is lost, so the curve is that of one rank."""
    values = tiny(batch_size=12, data={"source": "wine", "bag_size": 4})
    one = run_training(values, None, str(tmp_path / "one"))
    (tmp_path / "results").mkdir()
    values = {**values, "workers": 2, "sharding": {"kind": "ddp"}}
    two = run_ranks(2, run_training, values, None, str(tmp_path / "two"), folder=tmp_path / "results")[0]

    assert losses(two) == pytest.approx(losses(one), rel=1e-4)


def test_a_loss_of_whole_batches_trains(tmp_path):
    """Each micro-batch is a batch; telemetry has gradients for it and no losses of single examples."""
    result = run_training(
        tiny(steps=60, loss="batch-dice", telemetry={"every": 60}), None, str(tmp_path / "dice")
    )

    assert result["metrics"]["eval/accuracy"] > 0.9
    assert 0 < result["metrics"]["eval/loss"] < 0.5
    assert result["metrics"]["telemetry/gradient_norm_p50"] > 0
    assert "telemetry/loss_p50" not in result["metrics"]


def test_neural_collapse_is_measured_over_all_ranks(tmp_path):
    """Ranks with split parameters see what one process sees; the collapse goes on with training."""
    values = tiny(
        steps=60,
        analyses=["neural-collapse"],
        checkpoint={"every": 20},
        evaluation={"every": 20, "sequences": 1000},
    )
    one = run_training(values, None, str(tmp_path / "one"))
    curve = [metrics["eval/nc1"] for _, metrics in one["rows"] if "eval/nc1" in metrics]

    assert len(curve) == 3
    assert curve[-1] < curve[0]
    assert 0 <= one["metrics"]["eval/nc4"] < 0.1
    pictured = one["pictured"]["neural-collapse"]
    assert len(pictured) == 6
    assert len(pictured["found aligned"]) == 3
    (tmp_path / "results").mkdir()
    split = {**values, "workers": 2, "sharding": {"kind": "fsdp"}}
    two = run_ranks(2, run_training, split, None, str(tmp_path / "two"), folder=tmp_path / "results")[0]
    for name in ("nc1", "nc2_classifier", "nc2_features", "nc3"):
        assert two["metrics"][f"eval/{name}"] == pytest.approx(one["metrics"][f"eval/{name}"], rel=0.01)


def test_imbalanced_classes_are_compared_with_their_own_optimum(tmp_path):
    """The predicted rows grow with their classes."""
    values = tiny(analyses=["neural-collapse"], data={"source": "wine", "imbalance": 5})
    result = run_training(values, None, str(tmp_path / "run"))

    rows = result["pictured"]["neural-collapse"]["predicted classifier"]
    assert rows[0][0] > rows[1][1] > rows[2][2] >= 0
    assert rows[0][1] == 0


def test_the_task_chooses_the_spec(tmp_path):
    """In a file or as an override; without one it is a language model."""
    path = tmp_path / "run.yaml"
    path.write_text("steps: 3\n")

    assert isinstance(read_train_spec(path), TrainSpec)
    assert isinstance(read_train_spec(path, ["task=classification", "data.source=wine"]), ClassifierSpec)
    with pytest.raises(UserError, match=r"task='\[a' must be one of"):
        read_train_spec(path, ["task=[a"])
    spec = ClassifierSpec.parse(tiny())
    assert parse_train_spec(spec.model_dump(mode="json")) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "clasification"}, "must be one of classification, cross-tokenizer, language-model"),
        ({"task": ["classification"]}, "task=['classification'] must be one of"),
        (
            {"loss": "dco-step"},
            "loss.name=dco-step can't train task=classification as it is here; what can: aldr-kl",
        ),
        ({"sharding": {"kind": "fsdp", "vocab_parallel": True}}, "is for the large heads"),
        ({"data": {"corpus": "stdlib"}}, "data.corpus: unknown key"),
        ({"data": {"label_noise": 2}}, "data.label_noise=2"),
        ({"data": {"bag_size": 4}}, "batch_size=30 must be a multiple of data.bag_size=4"),
        ({"data": {"bag_size": 5}, "micro_batch_size": 6}, "micro_batch_size=6 must be a multiple"),
    ],
)
def test_a_wrong_spec_is_refused(changes, message):
    """By name, before anything runs."""
    with pytest.raises(UserError) as error:
        parse_train_spec(tiny(**changes))
    assert message in str(error.value)
