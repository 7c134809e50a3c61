"""Training runs that are packed end where ``lossworks train`` takes each alone."""

import pytest

from lossworks.tasks import parse_train_spec
from lossworks.tasks.classification import ClassifierSpec
from lossworks.tasks.text.language_model import TrainSpec
from lossworks.training.packed import PackedRun, advance, alike, obstacle
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training

# Runs that differ in all that packed runs may differ in.
RUNS = [
    {},
    {"seed": 3},
    {"loss": {"name": "cross-entropy", "label_smoothing": 0.2}, "optimizer": {"lr": 0.03}},
    {"loss": {"name": "ldr", "temperature": 0.3}, "optimizer": {"lr": 0.001, "clip_norm": None}},
    {"loss": {"name": "ldr", "temperature": 3.0}, "seed": 3},
    {"loss": {"name": "comp-sum", "tau": 1.5}, "optimizer": {"weight_decay": 0.0, "betas": [0.8, 0.9]}},
    {"loss": {"name": "aldr-kl"}, "schedule": {"kind": "linear", "warmup_steps": 3}},
    {"loss": {"name": "batch-dice"}, "optimizer": {"clip_norm": 0.05}},
]
MODELS = [{"kind": "mlp", "layers": 2, "width": 8}, {"kind": "cnn", "layers": 1, "width": 8}]


def specs(**common):
    values = {
        "data": {"source": "digits"},
        "steps": 9,
        "evaluation": {"every": 3, "sequences": 100},
        **common,
    }
    return [tiny(**{**values, **run}) for run in RUNS]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["kind"])
def test_packed_runs_are_what_each_is_alone(model, tmp_path):
    """Every metric at every evaluation, and so data, order, loss, clipping, schedule and optimiser."""
    runs = [PackedRun.start(ClassifierSpec.parse(values)) for values in specs(model=model)]
    reports = [advance(runs, run_steps) for run_steps in (3, 3, 3)]

    for index, values in enumerate(specs(model=model)):
        alone = dict(run_training(values, None, str(tmp_path / str(index)))["rows"])
        for report in (packed[index] for packed in reports):
            assert report.failure is None
            for name, value in report.metrics.items():
                assert value == pytest.approx(alone[report.step][name], rel=2e-3, abs=2e-4), (index, name)


IN_ONE = {"evaluation": {"every": 3, "sequences": 30}}
BINS = {"v_min": -4, "v_max": 4}
# Runs of further kinds, two of each that may be together.
KINDS = {
    "plain values": [
        {"task": "regression", "data": {"source": "friedman:120"}, "loss": loss, "seed": seed}
        for loss, seed in (("squared-error", 0), ("squared-error", 4))
    ],
    "bins": [
        {
            "task": "regression",
            "data": {"source": "friedman:120"},
            "loss": {"name": "hl-gauss", **BINS},
            **one,
        }
        for one in ({}, {"optimizer": {"lr": 0.002}})
    ],
    "bags of values": [
        {
            "task": "regression",
            "data": {"source": "friedman:120", "bag_size": 5},
            "loss": {"name": "aggregate-interpolation", "rho": rho},
        }
        for rho in (0.1, 0.1)
    ],
    "sets of labels": [
        {
            "task": "multi-label",
            "data": {"source": "topics:200", "labels": 30},
            "loss": {"name": "decoupled-softmax", "normalise": False, "temperature": t},
        }
        for t in (1.0, 0.5)
    ],
    # Each batch of an evaluation is one of its own, so that it is measured in one.
    "margins": [
        {"data": {"source": "breast-cancer"}, "loss": {"name": "ensloss", "seed": seed}, **IN_ONE}
        for seed in (0, 1)
    ],
    "bags of classes": [
        {"data": {"source": "wine", "bag_size": 5}, "loss": {"name": "aggregate-interpolation", "rho": rho}}
        for rho in (0.2, 0.9)
    ],
    "sums": [
        {
            "loss": [
                {"name": "cross-entropy", "weight": {"value": 1, "final": 0, "start": 2, "steps": 5}},
                other,
            ]
        }
        for other in ("batch-dice", {"name": "ldr", "weight": 0.5})
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_runs_of_every_kind_are_what_each_is_alone(kind, tmp_path):
    """Values, sets of labels, margins, bags and sums: every metric at every evaluation."""
    common = {"steps": 9, "evaluation": {"every": 3, "sequences": 100}}
    values = [tiny(**{**common, **one}) for one in KINDS[kind]]
    runs = [PackedRun.start(parse_train_spec(one)) for one in values]
    assert all(obstacle(run.spec) is None for run in runs)
    assert len({run.common for run in runs}) == 1
    reports = [advance(runs, run_steps) for run_steps in (3, 3, 3)]

    for index, one in enumerate(values):
        alone = dict(run_training(one, None, str(tmp_path / str(index)))["rows"])
        for report in (packed[index] for packed in reports):
            assert report.failure is None
            for name, value in report.metrics.items():
                assert value == pytest.approx(alone[report.step][name], rel=2e-3, abs=2e-4), name


def test_who_else_is_there_makes_no_difference():
    """A run that joins a pack late, or leaves it, has the numbers it has in a pack of its own."""
    first, second = (ClassifierSpec.parse(values) for values in specs()[:2])
    apart = [PackedRun.start(first), PackedRun.start(second)]
    expected = [advance([run], 6)[0] for run in apart]
    stays, leaves, late = PackedRun.start(first), PackedRun.start(second), PackedRun.start(second)
    advance([stays, leaves], 3)
    found = [advance([stays, late], 3)[0], *advance([leaves], 3), *advance([late], 3)]

    for report, alone in zip(found, (expected[0], expected[1], expected[1]), strict=True):
        assert report.step == alone.step == 6
        assert report.metrics == pytest.approx(alone.metrics, rel=1e-4, abs=1e-6)


def test_a_run_that_diverges_is_reported_and_disturbs_no_other():
    """The step is named; the others have the numbers they have without it."""
    calm = ClassifierSpec.parse(tiny())
    wild = ClassifierSpec.parse(tiny(optimizer={"lr": 10.0}, loss={"name": "comp-sum", "tau": 0.0}, seed=1))
    alone = advance([PackedRun.start(calm)], 6)[0]
    runs = [PackedRun.start(calm), PackedRun.start(wild)]
    for value in runs[1].tensors["params"].values():
        value.fill_(float("nan"))
    found = advance(runs, 6)

    assert found[0].metrics == pytest.approx(alone.metrics, rel=1e-4)
    assert found[1].failure == "the loss became NaN or infinite at step 1"
    assert found[1].step == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"model": {"width": 8, "dropout": 0.5}}, "draws random numbers"),
        ({"precision": "bf16"}, "precision=bf16"),
        ({"telemetry": 5}, "telemetry"),
        ({"analyses": ["neural-collapse"]}, "analyses is set"),
        ({"loss": "ensloss", "data": {"source": "breast-cancer"}, "workers": 2, "sharding": "ddp"}, "random"),
        ({"resources_per_worker": {"CPU": 1, "GPU": 1}}, "GPU"),
    ],
)
def test_what_can_not_be_packed_says_why(changes, why):
    found = obstacle(ClassifierSpec.parse(tiny(**changes)))

    assert found is None if why is None else why in found


def test_language_models_are_not_packed():
    assert "language models" in obstacle(TrainSpec.parse({}))


def test_runs_are_alike_but_for_what_may_differ():
    """Loss, optimiser, schedule and seed may; the rest decides shapes, batches or data."""
    common = {alike(ClassifierSpec.parse(values)) for values in specs()}

    assert len(common) == 1
    assert alike(ClassifierSpec.parse({**specs()[0], "batch_size": 5})) not in common
