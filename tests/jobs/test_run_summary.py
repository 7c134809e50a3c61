"""What a person reads at the end of a training run."""

from lossworks.tasks import parse_train_spec
from lossworks.tasks.registry import task_of
from lossworks_jobs.training.run_summary import figures
from lossworks_testing.classification import tiny


def test_it_stands_beside_the_models_figures():
    """A model that is no better in any has learnt nothing of its inputs, which is said."""
    spec = parse_train_spec(tiny(data={"source": "wine"}))
    found = task_of(spec).open(spec, None).simplest()
    better = {**found.yardsticks, "eval/accuracy": 0.9}

    shown, nothing = (dict(figures(spec, values, found)) for values in (better, found.yardsticks))

    assert shown["held-out accuracy"].startswith("0.9000 (the classes' shares alone: 0.")
    assert "learnt of the inputs" not in shown
    assert nothing["learnt of the inputs"].startswith("nothing: accuracy, ")


def test_what_companions_took_is_said_in_words():
    spec = parse_train_spec(tiny(data={"source": "wine"}))
    row = {"companions/seconds": 56.92, "companions/bytes": 28.0 * 2**20, "eval/accuracy": 0.9}

    shown = dict(figures(spec, row, None))

    assert shown["companions"] == "56.9 s and 28 MiB on each worker"
    assert not any("/" in name for name in shown)
