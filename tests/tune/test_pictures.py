"""Pictures and words of a sweep, of results made by hand."""

import math
import struct
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest

from lossworks_tune.sweeps.dimensions import DimensionSpec
from lossworks_tune.sweeps.importance import importances, marks_of, position, share, span, ticks
from lossworks_tune.sweeps.ledger import Configuration, Trial, TrialStatus
from lossworks_tune.sweeps.pictures import draw_all
from lossworks_tune.sweeps.results import Results
from lossworks_tune.sweeps.spec import SweepSpec
from lossworks_tune.sweeps.summary import beside_the_simplest, gains

STEPS, EVERY = 100, 50


def spec_of(**changes: Any) -> SweepSpec:
    base = {"task": "classification", "steps": STEPS, "evaluation": {"every": EVERY}}
    space = {"optimizer.lr": {"log": [1e-4, 1e-2]}}
    values = {"base": base, "losses": ["cross-entropy", "ldr"], "space": space, **changes}
    return SweepSpec.parse(values)


def trial_of(
    number: int,
    fields: dict[str, Any],
    parameters: dict[str, Any] | None = None,
    *,
    anchor: str = "",
    seeds: int = 1,
    status: TrialStatus = "finished",
) -> Trial:
    """Return a trial whose accuracy has its best at a learning rate of 1e-3."""
    noise = np.random.default_rng(number)
    best = 0.9 - 0.2 * abs(math.log10(fields.get("optimizer.lr", 1e-3)) + 3)
    rows: list[Any] = []
    for step in range(EVERY, STEPS * seeds + 1, EVERY):
        accuracy = best - 0.3 * (step % STEPS > 0) + noise.normal(0, 0.01)
        metrics = {"eval/accuracy": accuracy, "eval/ece": 0.2 * accuracy + noise.normal(0, 0.03)}
        rows.append({"step": step, "metrics": metrics})
    if status != "finished":
        rows.pop()
    finals = [row["metrics"] for row in rows if row["step"] % STEPS == 0]
    return Trial(Configuration(number, fields, parameters or {}, anchor), status, "", rows, finals)


def results_of(count: int = 24, *, status: TrialStatus | None = None, **changes: Any) -> Results:
    """Return results of anchors and so many drawn configurations, of which one in six was stopped."""
    spec = spec_of(**changes)
    space, seeds, draw = spec.make_space(), len(spec.seeds), np.random.default_rng(0)
    trials = [
        trial_of(number, fields, anchor=title, seeds=seeds, status=status or "finished")
        for number, (title, fields) in enumerate(space.anchors())
    ]
    for number in range(len(trials), len(trials) + count):
        parameters = {
            "loss": ("cross-entropy", "ldr")[number % 2],
            "optimizer.lr": 10 ** draw.uniform(-4, -2),
        }
        own = {n: of for n, of in space.dimensions.items() if n.startswith(f"{parameters['loss']}.")}
        parameters |= {name: float(draw.uniform(*of.range)) for name, of in own.items()}
        ended: TrialStatus = status or ("stopped" if number % 6 == 5 else "finished")
        trials.append(trial_of(number, space.fields(parameters), parameters, seeds=seeds, status=ended))
    return Results(spec, space, STEPS, tuple(trials), ())


def confirmed(results: Results) -> Results:
    again = [
        trial_of(100 + t.configuration.number, t.configuration.fields, seeds=5) for t in results.to_confirm()
    ]
    pairs = zip(results.to_confirm(), again, strict=True)
    return replace(results, confirmed=tuple(replace(new, configuration=t.configuration) for t, new in pairs))


def drawn(results: Results, path: Path) -> list[str]:
    """Return the names of what is drawn, which is looked at as far as a program can."""
    files = draw_all(results, path)
    assert sorted(files) == sorted(path.iterdir())
    pictures = [file for file in files if file.suffix == ".png"]
    for file in pictures:
        assert file.with_suffix(".svg").read_text(encoding="utf-8").startswith("<?xml")
        content = file.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert 1600 <= width <= 2000
        assert 400 <= height <= 2000
        assert len(content) > 12_000  # an empty one has 8 kB
    return [file.stem for file in pictures]


# Which are drawn


def test_one_objective_on_one_seed_with_fresh_ones(tmp_path: Path) -> None:
    results = confirmed(results_of())
    expected = ["hyperparameters", "parallel", "importance", "curves", "confirmed"]
    assert drawn(results, tmp_path) == expected


def test_two_objectives_on_three_seeds_have_a_front(tmp_path: Path) -> None:
    objectives = {"eval/accuracy": "max", "eval/ece": "min"}
    results = confirmed(results_of(objectives=objectives, seeds=[0, 1, 2]))
    diverged = trial_of(99, {"loss.name": "ldr", "optimizer.lr": 1e7}, {"loss": "ldr"}, seeds=3)
    broken = replace(results.trials[4], finals=[{"eval/accuracy": 0.8, "eval/ece": math.nan}])
    trials = (*results.trials[:4], broken, *results.trials[5:])
    expected = ["hyperparameters", "parallel", "curves", "front", "confirmed"]
    few = replace(results, trials=(*trials[:9], diverged))
    assert drawn(few, tmp_path) == expected


def test_without_finished_trials_there_are_only_curves(tmp_path: Path) -> None:
    running = results_of(4, status="running")
    assert drawn(running, tmp_path) == ["curves"]
    assert draw_all(replace(running, trials=()), tmp_path) == []
    unheard = tuple(replace(trial, rows=[]) for trial in running.trials)
    assert draw_all(replace(running, trials=unheard), tmp_path) == []


# What decides


def test_what_decides_is_found_on_the_scale_that_is_searched() -> None:
    draw = np.random.default_rng(0)
    dimensions = {
        "loss": DimensionSpec(choice=tuple(f"loss-{place}" for place in range(18))),
        "optimizer.lr": DimensionSpec(log=(1e-4, 1e-1)),
    }
    trials = []
    for number in range(72):
        parameters = {"loss": f"loss-{number % 18}", "optimizer.lr": 10 ** draw.uniform(-4, -1)}
        final = {"eval/accuracy": 0.5 + 0.2 * (parameters["optimizer.lr"] > 1e-3) + draw.normal(0, 0.01)}
        configuration = Configuration(number, {"loss.name": parameters["loss"]}, parameters)
        trials.append(Trial(configuration, "finished", "", [], [final]))
    results = replace(results_of(0), trials=tuple(trials), space=SimpleNamespace(dimensions=dimensions))
    verbosity = optuna.logging.get_verbosity()
    found = importances(results, trials, list(dimensions))
    assert optuna.logging.get_verbosity() == verbosity
    assert list(found) == ["optimizer.lr", "loss"]
    # Two thirds of the decades are above 1e-3, but 99 % of the numbers.
    assert 0.9 < found["optimizer.lr"] <= 1
    assert found["loss"] < 0.05
    assert sum(found.values()) <= 1 + 1e-9


def test_trials_that_are_alike_decide_nothing() -> None:
    results = results_of(8)
    alike = [replace(trial, finals=[{"eval/accuracy": 0.5}]) for trial in results.trials[3:]]
    assert importances(results, alike, ["optimizer.lr"]) == {}


# Where points are


def test_anchors_have_the_values_that_they_train() -> None:
    results = results_of(6)
    marks = {mark.trial.configuration.number: mark for mark in marks_of(results)}
    plain, usual, neutral = (marks[number].values for number in range(3))
    assert plain == {"loss": "cross-entropy", "optimizer.lr": 3e-3, "cross-entropy.label_smoothing": 0.0}
    assert usual == {"loss": "ldr", "optimizer.lr": 3e-3, "ldr.temperature": 1.0, "ldr.margin": 0.1}
    assert neutral == usual | {"ldr.margin": 0.0}
    assert [marks[number].kind for number in range(6)] == [*["anchor"] * 3, "drawn", "drawn", "stopped"]
    assert marks[3].values == results.trials[3].configuration.parameters
    objectives = [mark.objective for mark in marks.values() if mark.kind != "stopped"]
    assert objectives == sorted(objectives, reverse=True)


def test_places_of_values() -> None:
    rate, size = DimensionSpec(log=(1e-4, 1e-2)), DimensionSpec(integer=(1, 3))
    layers = DimensionSpec(choice=([8], [8, 8], [16]))
    assert share(rate, 1e-3) == pytest.approx(0.5)
    assert [share(size, value) for value in (1, 2, 3)] == [0, 0.5, 1]
    assert share(layers, (8, 8)) == 0.5
    assert ticks(size) == {"1": 0, "2": 0.5, "3": 1}
    assert list(ticks(layers)) == ["[8]", "[8, 8]", "[16]"]
    beside = [position(layers, [8, 8], trial_of(number, {"loss.name": "ldr"})) for number in range(20)]
    assert len(set(beside)) == 20
    assert all(abs(place - 1) <= 0.25 for place in beside)


def test_far_worse_values_hide_no_others() -> None:
    values = [0.80, 0.82, 0.84, 0.85, 0.86, 0.1]
    assert span(values, "max") == (0.80, 0.86)
    assert span(values, "min") == (0.1, 0.86)
    assert span([0.5, 0.5, 0.5, 0.4], "max") == (0.4, 0.5)


@pytest.mark.parametrize(
    ("ahead", "named", "said"),
    [
        ((0.1, 0.11, 0.09), "winner", "eval/accuracy +0.1000 ± 0.0248 (cross-entropy, defaults)"),
        ((0.1, -0.1, 0.03), "best mean, in a tie with the baseline", "a tie (cross-entropy, defaults)"),
        ((0.1,), "best mean, in a tie with the baseline", "of one seed, which chance can make"),
    ],
)
def test_a_tie_is_called_a_tie(ahead, named, said):
    """What chance can make of the seeds is no victory."""
    seeds = list(range(len(ahead)))
    spec = spec_of(seeds=seeds, confirm={"top": 1, "seeds": [50 + seed for seed in seeds]})

    def trial(number, slug, values, anchor):
        finals = [{"eval/accuracy": value, "eval/ece": 0.1} for value in values]
        return Trial(Configuration(number, {"loss.name": slug}, {}, anchor), "finished", "", [], finals)

    base = trial(0, "cross-entropy", [0.8] * len(ahead), "cross-entropy, defaults")
    other = trial(1, "ldr", [0.8 + one for one in ahead], "ldr, defaults")
    found = Results(spec, spec.make_space(), STEPS, (base, other), (base, other))

    lines = gains(found)

    assert lines[0] == (named, "ldr, defaults")
    assert said in dict(lines)["over the baseline"]


@pytest.mark.parametrize(("accuracy", "better"), [(0.9, True), (0.05, False)])
def test_the_winner_stands_beside_the_simplest_answer(accuracy, better):
    """Two configurations at the share of the largest class have learnt nothing, whoever is ahead."""
    spec = spec_of(seeds=[0], confirm={"top": 1, "seeds": [50]})
    finals = [{"eval/accuracy": accuracy, "eval/ece": 0.1}]
    trial = Trial(Configuration(0, {"loss.name": "ldr"}, {}, "ldr, defaults"), "finished", "", [], finals)
    lines = beside_the_simplest(Results(spec, spec.make_space(), STEPS, (trial,), (trial,)))

    title, text = lines[0]
    assert title
    assert text.startswith("eval/accuracy 0.")
    assert text.endswith("the best above is no better") is not better
