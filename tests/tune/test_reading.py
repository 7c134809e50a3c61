"""What a sweep has found is read again only as far as its files have changed."""

from pathlib import Path

import pytest

from lossworks.errors import UserError
from lossworks.tracking import Journal
from lossworks_testing.sweeps import results, seen, sweep_at, tiny_sweep
from lossworks_tune.sweeps.ledger import Configuration, End, Trial

ACCURACY = "eval/accuracy"


def reported(folder, step, accuracy):
    with Journal.open(folder.journal) as journal:
        journal.write(step, {ACCURACY: accuracy})


@pytest.fixture
def running(tmp_path):
    """A sweep of three trials that have begun."""
    sweep = sweep_at(tiny_sweep(seeds=[0, 1]), tmp_path)
    for number in range(3):
        folder = sweep.trials.of(number)
        folder.begin(Configuration(number, {"loss.name": "ldr"}))
        reported(folder, 12, 0.5 + 0.1 * number)
    return sweep


def test_a_trial_that_has_not_changed_is_not_read_again(running, monkeypatch):
    """One that has changed is, with all that is new: reports, another configuration, its end."""
    before = running.results().trials
    read, names = Trial.read, []
    monkeypatch.setattr(
        Trial, "read", lambda folder, steps: names.append(folder.path.name) or read(folder, steps)
    )

    assert all(one is other for one, other in zip(running.results().trials, before, strict=True))
    assert names == []
    reported(running.trials.of(1), 24, 0.9)
    running.trials.of(2).begin(Configuration(2, {"loss.name": "dco"}))  # of the same length as before
    running.trials.of(3).begin(Configuration(3, {"loss.name": "ldr"}))
    after = running.results().trials
    assert names == ["00001", "00002", "00003"]
    assert after[0] is before[0]
    assert after[1].seeds_values(ACCURACY) == [0.6, 0.9]
    assert after[2].configuration.loss == "dco"
    running.trials.of(1).finish(End("finished", "", 24))
    assert [trial.status for trial in running.results().trials] == [
        "running",
        "finished",
        "running",
        "running",
    ]
    assert names[3:] == ["00001"]


def test_what_is_kept_is_what_a_fresh_look_finds(running):
    """After any changes."""
    for step in (16, 20, 24):
        for number in range(0, 3, 2):
            reported(running.trials.of(number), step, step / 100)
        running.results()
    running.trials.of(0).finish(End("stopped", "by asha", 24))

    assert seen(running.results()) == seen(results(running.spec, running.path))


def test_a_sweep_without_a_folder_has_found_nothing():
    assert sweep_at(tiny_sweep(), Path("/nowhere")).results().trials == ()


def test_objectives_are_means_over_the_seeds_so_far():
    """Of what each of them has measured last; one that is missing anywhere is named."""
    spec = tiny_sweep(objectives={ACCURACY: "max", "eval/ece": "min"}, search="nsga2")
    finals = [{ACCURACY: 0.5, "eval/ece": 0.2}, {ACCURACY: 0.75, "eval/ece": 0.1, "train/lr": 1.0}]

    assert spec.means(finals) == pytest.approx({ACCURACY: 0.625, "eval/ece": 0.15})
    with pytest.raises(UserError, match="objectives=eval/ece: was not reported; reported are eval/accuracy"):
        spec.means([*finals, {ACCURACY: 1.0}])
