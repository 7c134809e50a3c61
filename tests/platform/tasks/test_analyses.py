"""Analyses: of a model with each evaluation, and of the curves of several runs."""

import math

import pytest

from lossworks.catalogue.registry import create
from lossworks.errors import UserError
from lossworks.tasks import parse_train_spec
from lossworks.tasks.analyses import Probe, RunCurves
from lossworks.tasks.registry import task_of
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import analysed
from lossworks_testing.classification import tiny
from lossworks_testing.training import run_training


def curves(name, final, *, lr, first=2.0, **changes):
    """Return a run whose held-out loss ends at ``final``."""
    spec = parse_train_spec(tiny(name=name, optimizer={"lr": lr}, **changes))
    steps = [3, 6]
    found = {"train/loss": (steps, [first, final]), "eval/loss": (steps, [1.5, final])}
    return RunCurves(name, spec, found)


def test_a_spec_names_hyperparameters_of_an_analysis(tmp_path):
    """They decide what the measured Gram matrices are compared with; figures come with each evaluation."""
    skewed = {"source": "wine", "imbalance": 4.0}
    analyses = [[{"name": "neural-collapse", "depth": depth, "decay_w": 1e-3}] for depth in (1, 2)]
    one, two = (
        run_training(tiny(data=skewed, analyses=given), None, str(tmp_path / str(number)))
        for number, given in enumerate(analyses)
    )

    assert [step for step, row in one["rows"] if "eval/nc2_classifier" in row] == [3, 6]
    assert one["metrics"]["eval/nc1"] == two["metrics"]["eval/nc1"]
    assert one["metrics"]["eval/nc2_classifier"] != two["metrics"]["eval/nc2_classifier"]
    first, second = (result["pictured"]["neural-collapse"] for result in (one, two))
    assert first["found classifier"] == second["found classifier"]
    assert first["predicted classifier"] != second["predicted classifier"]


def test_a_model_is_measured_apart_from_training():
    """As an evaluation measures it, and the model is left in training as it was."""
    spec = parse_train_spec(tiny())
    task = task_of(spec).open(spec, None)
    model = task.build_model()
    analysis = create("neural-collapse")
    found = analysed(model, task, World.current(), analysis, limit=None, micro_batch_size=7, bf16=False)
    again = analysed(model, task, World.current(), analysis, limit=None, micro_batch_size=None, bf16=False)

    assert found.figures == pytest.approx(again.figures, rel=1e-6)
    assert model.training
    assert isinstance(analysis.draw(found.pictured, {}).axes, list)


def test_sensitivity_is_compared_over_groups_of_runs():
    """Runs that differ in more than the learning rate are curves of their own; ℓ_0 is the first loss."""
    runs = [
        curves("a", 0.5, lr=0.01),
        curves("b", math.nan, lr=0.1),
        curves("c", 0.4, lr=0.01, model={"width": 8}, seed=1),
        curves("d", 0.6, lr=0.1, model={"width": 8}, seed=1),
    ]
    found = create("lr-sensitivity").compare(runs)

    # The diverged run counts as the initial loss, 2: (0 + 1.5) / 2.
    assert found.figures == pytest.approx(
        {
            "seed=0, model.width=16/sensitivity": 0.75,
            "seed=1, model.width=8/sensitivity": 0.1,
        }
    )
    assert found.pictured["initial"] == 2.0
    figure = create("lr-sensitivity").draw(found.pictured, {})
    assert len(figure.axes[0].get_lines()) == 3


def test_one_model_is_one_group():
    """Whatever the runs are called; ℓ_0 and the figure may be given."""
    runs = [curves("a", 0.5, lr=0.01), curves("b", 0.7, lr=0.1)]
    analysis = create("lr-sensitivity", initial=0.6, figure="train/loss")

    assert analysis.compare(runs).figures == pytest.approx({"runs/sensitivity": 0.05})


def test_what_can_not_be_compared_is_refused():
    """One rate alone, a figure that was not measured, and analyses of runs where a model is measured."""
    analysis = create("lr-sensitivity")
    with pytest.raises(UserError, match=r"needs runs of at least two learning rates, optimizer\.lr"):
        analysis.compare([curves("a", 0.5, lr=0.01), curves("b", 0.5, lr=0.01, seed=2)])
    with pytest.raises(UserError, match="needs runs of at least two"):
        analysis.compare([])
    with pytest.raises(UserError, match="run a: has no eval/cross_entropy; it has eval/loss, train/loss"):
        create("lr-sensitivity", figure="eval/cross_entropy").compare([curves("a", 0.5, lr=0.01)])
    with pytest.raises(UserError, match="compares runs: use `lossworks analyse lr-sensitivity RUN RUN`"):
        parse_train_spec(tiny(analyses=["lr-sensitivity"]))
    with pytest.raises(UserError, match="neural-collapse looks at classifiers, not task=regression"):
        parse_train_spec(
            tiny(task="regression", loss="huber", data={"source": "diabetes"}, analyses=["neural-collapse"])
        )


def test_a_class_without_examples_is_named():
    """It has no mean."""
    spec = parse_train_spec(tiny())
    task = task_of(spec).open(spec, None)
    task.train.labels[:] = 1

    def over(measure, data, rows):
        return measure(task.build_model().outputs(data.inputs), data.batch(rows))

    with pytest.raises(UserError, match=r"neural-collapse: counts=\[0, 133, 0\] must be at least 1"):
        create("neural-collapse").measure(Probe(task, over, task.held_out, task.build_model()))
