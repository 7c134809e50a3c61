"""Studies: what they train, packed or not, killed and gone on with, tracked, drawn, and refused."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from lossworks.cli import main
from lossworks.errors import RunError
from lossworks_testing.studies import tiny_study
from lossworks_testing.training import run_training
from lossworks_tune import packs
from lossworks_tune.studies.plan import Training
from lossworks_tune.studies.run import read_study_spec, study
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.store import Result, ResultStore

COMMAND = [sys.executable, "-c", "import sys; from lossworks.cli import main; sys.exit(main())"]
LDR = {"better": "ldr", "than": "cross-entropy", "on": "eval/accuracy"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs").mkdir(parents=True)
    return tmp_path / "home"


def written(path, spec):
    file = path / "study.yaml"
    file.write_text(spec.to_yaml())
    return file


# What is trained


def test_what_limits_a_study_is_said_before_it_trains():
    """One seed, and losses that are the same at their hyperparameters."""
    several = tiny_study(compare=["cross-entropy", "ldr", "comp-sum"], seeds=5).make_plan()
    one = tiny_study(compare={"ldr": {"loss": "ldr"}, "dice": {"loss": "dice"}}, seeds=1).make_plan()
    apart = {"a": {"loss": "comp-sum"}, "b": {"loss": "cross-entropy", "optimizer.lr": 0.5}}

    assert several.notes == ["comp-sum is cross-entropy with these hyperparameters: they differ by rounding"]
    assert one.notes == ["one seed gives no interval, so that nothing is told apart; use seeds=5"]
    assert tiny_study(compare=apart, seeds=2).make_plan().notes == []


def test_all_variants_are_trained_in_all_settings_with_all_seeds():
    """Each with its own fields over the base; the base's other fields stay."""
    spec = tiny_study(
        compare={
            "plain": {},
            "soft": {"loss.temperature": 3},
            "other": {"loss": {"name": "comp-sum", "tau": 2}},
        },
        base={**tiny_study().base, "loss": {"name": "ldr", "margin": 0.5}},
        over={"data.label_noise": [0, 0.5], "optimizer": {"lr": [0.1, 0.2]}},
        seeds=[3, 7],
    )
    plan = spec.make_plan()
    found = {training.key: training.spec for training in plan.trainings}

    assert len(found) == len({training.digest for training in plan.trainings}) == 3 * 4 * 2
    soft = found["soft", "data.label_noise=0.5, optimizer.lr=0.1", 7]
    assert (soft.seed, soft.optimizer.lr, soft.data.label_noise) == (7, 0.1, 0.5)
    assert (soft.data.source, soft.model.width) == ("digits", 8)
    assert (soft.loss.hyperparameters["margin"], soft.loss.hyperparameters["temperature"]) == (0.5, 3)
    other = found["other", "data.label_noise=0, optimizer.lr=0.2", 3]
    assert other.loss.hyperparameters == {"tau": 2}  # the base's own are not another loss's


def test_a_list_is_short_for_losses_and_dots_for_groups():
    short = tiny_study(compare=["ldr", "aldr-kl"], seeds=3)
    whole = tiny_study(
        compare={"ldr": {"loss.name": "ldr"}, "aldr-kl": {"loss": {"name": "aldr-kl"}}}, seeds=[0, 1, 2]
    )

    assert [t.digest for t in short.make_plan().trainings] == [t.digest for t in whole.make_plan().trainings]
    assert StudySpec.parse(short.model_dump(mode="json")) == short


def test_digests_change_with_what_is_trained_only():
    """Not with names, storage or tracking."""
    base = tiny_study().base
    one = tiny_study().make_plan().trainings[0].digest

    same = tiny_study(base={**base, "name": "other", "tracking": {"experiment": "other"}})
    assert same.make_plan().trainings[0].digest == one
    assert tiny_study(base={**base, "steps": 9}).make_plan().trainings[0].digest != one


def test_packed_trainings_are_what_each_gives_alone(home, tmp_path):
    """In both settings, to rounding."""
    spec = tiny_study()
    found = study(spec).outcome

    for training in found.plan.trainings[:: len(spec.seeds) * 2 + 1]:
        folder = str(tmp_path / training.digest)
        alone = run_training(training.spec.model_dump(mode="json"), None, folder)["metrics"]
        ours = found.results[training.key].metrics
        for name in found.yardsticks:
            assert ours[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-3)


def test_what_can_not_be_packed_is_trained_by_its_task(home, cluster, tmp_path):
    """A variant with dropout, by Ray Train beside a packed one; the result is what it gives alone."""
    spec = tiny_study(
        compare={"plain": {}, "dropout": {"model": {"dropout": 0.5}}},
        over={},
        seeds=1,
        yardsticks=["eval/accuracy"],
    )
    result = study(spec)
    training = result.outcome.plan.trainings[1]
    alone = run_training(training.spec.model_dump(mode="json"), None, str(tmp_path / "alone"))["metrics"]
    trained = [path.name for path in (result.folder.path / "trainings").iterdir()]

    assert trained == [training.digest]
    ours = result.outcome.results[training.key].metrics
    assert ours["eval/accuracy"] == pytest.approx(alone["eval/accuracy"], abs=1e-6)


@pytest.mark.slow
def test_variants_begin_from_what_is_trained_first(home, cluster, tmp_path):
    """One run a seed: a variant gives what its training gives alone, begun from that run's weights."""
    spec = tiny_study(
        first={"start": {"loss": "ldr", "steps": 16}},
        compare={"on": {"steps": 4}, "anew": {"steps": 4, "start": None}},
        over={},
        yardsticks=["eval/accuracy", "eval/cross_entropy"],
    )
    result = study(spec)
    plan, trainings = result.outcome.plan, result.folder.path / "trainings"
    before = plan.first("start", 1)
    after = next(one for one in plan.trainings if one.key == ("on", "", 1))
    alone = plan.placed(after, lambda one: str(trainings / one.digest))
    expected = run_training(alone, None, str(tmp_path / "alone"))["metrics"]
    anew = next(one for one in plan.trainings if one.key == ("anew", "", 1))

    assert (before.spec.steps, before.spec.loss.name, before.spec.start) == (16, "ldr", None)
    assert alone["start"] == str(trainings / before.digest)
    assert anew.spec.start is None
    for name in result.outcome.yardsticks:
        assert result.outcome.results[after.key].metrics[name] == pytest.approx(expected[name], abs=1e-6)
    assert set(result.outcome.results) == {one.key for one in plan.trainings}
    again = study(read_study_spec(result.folder), resume=result.folder).outcome
    assert again.results == result.outcome.results
    stored = ResultStore(result.folder.path / "results.jsonl").of(plan.firsts)
    assert set(stored) == {("first:start", "", 0), ("first:start", "", 1)}


def test_what_is_trained_first_decides_over_results():
    """Digests of variants change with it; without any they are as they always were."""
    one, other = (
        tiny_study(first={"start": {"steps": steps}}, compare={"a": {}, "b": {"steps": 2}}).make_plan()
        for steps in (8, 9)
    )
    whole = {"task": "language-model", "steps": 3, "model": {"width": 16}}
    variants = {"a": {"start": "first:big"}, "b": {}}
    base = {"task": "language-model", "workers": 1, "sharding": "none"}
    plan = tiny_study(first={"big": whole}, compare=variants, base=base, over={}).make_plan()

    assert {a.digest for a in one.trainings}.isdisjoint({b.digest for b in other.trainings})
    assert [(t.variant, t.seed, t.spec.model.width, t.spec.workers) for t in plan.firsts] == [
        ("first:big", 0, 16, 2),  # a whole spec, of which nothing is the base's
        ("first:big", 1, 16, 2),
    ]
    assert [t.needs for t in plan.trainings] == [("big",), ("big",), (), ()]
    assert tiny_study(first={}).digest == tiny_study().digest


def test_nothing_begins_from_what_failed(home, monkeypatch):
    """It is said of each training that needed it, and the others are trained."""
    started = []

    def fake(plan, trainings, folder, free, keep):
        started.extend(one.key for one in trainings)
        for one in trainings:
            failed = one.key == ("first:start", "", 0)
            keep(one, Result({}, "the loss became NaN") if failed else Result({"eval/accuracy": 0.5}))

    monkeypatch.setattr("lossworks_tune.studies.training._at_once", fake)
    monkeypatch.setattr("lossworks_tune.studies.training.cluster", lambda _: contextlib.nullcontext(2.0))
    variants = {"a": {}, "b": {"steps": 2, "evaluation.every": 2}}
    spec = tiny_study(first={"start": {"steps": 4}}, compare=variants, over={}, yardsticks=["eval/accuracy"])
    found = study(spec).outcome

    assert started == [("first:start", "", 0), ("first:start", "", 1), ("a", "", 1), ("b", "", 1)]
    assert set(found.failures.values()) == {"first:start failed: the loss became NaN"}
    assert set(found.failures) == {("a", "", 0), ("b", "", 0)}


@pytest.mark.slow
def test_strategies_of_federations_are_compared(home, cluster):
    """Variants may be anything that the base's spec has."""
    base = {
        "rounds": 2,
        "data": {"source": "wine"},
        "split": {"clients": 3},
        "model": {"width": 4, "layers": 1},
        "local": {"epochs": 1},
    }
    compare = {name: {"strategies": [name]} for name in ("fedavg", "fedprox")}
    spec = StudySpec.parse({"base": {"kind": "federation", **base}, "compare": compare, "seeds": 2})
    found = study(spec).outcome

    assert "server/accuracy" in found.yardsticks
    assert not found.failures
    assert all(len(found.values(name, found.plan.settings, "server/accuracy")) == 2 for name in compare)


# Going on


def killed(home, file, size):
    """Start a study, kill it with SIGKILL once its results have so many bytes, and return their file."""
    before = set((home / "runs").iterdir())
    process = subprocess.Popen([*COMMAND, "study", str(file)], stdout=subprocess.DEVNULL, env=os.environ)
    deadline, results = time.monotonic() + 200, None
    while time.monotonic() < deadline and not (results and results.stat().st_size > size):
        new = set((home / "runs").iterdir()) - before
        results = next((file for folder in new for file in folder.glob("results.jsonl")), None)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return results


def lines_of(results):
    """Return the whole lines of a file."""
    return [line for line in results.read_bytes().split(b"\n") if line.endswith(b"}")]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_repeats_nothing(home, tmp_path, capsys):
    """SIGKILL between any two instructions: what had ended stays as it was, and the rest is as without."""
    noises = [round(0.05 * at, 2) for at in range(12)]
    spec = tiny_study(over={"data.label_noise": noises}, expect=[LDR], name="killed")
    expected = study(spec).outcome
    results = killed(home, written(tmp_path, spec), 3000)
    kept = lines_of(results)
    assert 0 < len(kept) < len(expected.plan.trainings)

    assert main(["study", "--resume", str(results.parent)]) == 0

    assert lines_of(results)[: len(kept)] == kept
    assert len(lines_of(results)) == len(expected.plan.trainings)
    found = ResultStore(results).of(expected.plan.trainings)
    for key, result in expected.results.items():
        assert found[key].metrics == pytest.approx(result.metrics, rel=1e-3, abs=1e-3)
    assert "verdict" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_study_goes_on_by_ray(home, tmp_path):
    """Trainings that can't be packed: what had ended stays, what had begun goes on."""
    compare = {f"{share}": {"model": {"dropout": share}} for share in (0.1, 0.5)}
    spec = tiny_study(compare=compare, over={})
    results = killed(home, written(tmp_path, spec), 10)
    kept = lines_of(results)
    subprocess.run(
        [*COMMAND, "study", "--resume", str(results.parent)], check=True, env=os.environ, timeout=300
    )

    assert 0 < len(kept) < 4
    assert lines_of(results)[: len(kept)] == kept
    assert len(lines_of(results)) == 4
    assert not any(result.failure for result in ResultStore(results).of(spec.make_plan().trainings).values())


def test_a_study_that_has_ended_trains_nothing_when_gone_on_with(home, monkeypatch):
    first = study(tiny_study(over={}))
    monkeypatch.setattr(packs, "advance", lambda runs, steps, *_: pytest.fail("trained again"))
    again = study(read_study_spec(first.folder), resume=first.folder)

    assert again.outcome.results == first.outcome.results


def test_results_are_those_of_the_very_spec_that_is_trained(tmp_path):
    """A torn last line is passed over and what follows is whole; another digest is another training."""
    store, (one, two, *_) = ResultStore(tmp_path / "results.jsonl"), tiny_study().make_plan().trainings
    store.add(one, Result({"eval/accuracy": 0.5, "eval/ece": float("nan")}))
    with store.path.open("ab") as file:
        file.write(b'{"variant": "cross-en')
    store.add(two, Result({}, "the loss became NaN"))
    changed = Training(one.variant, one.setting, one.seed, one.spec, "another")
    found = store.of([one, two])

    assert found[one.key].metrics == pytest.approx(
        {"eval/accuracy": 0.5, "eval/ece": float("nan")}, nan_ok=True
    )
    assert found[two.key] == Result({}, "the loss became NaN")
    assert store.of([changed]) == {}


def test_trainings_that_fail_are_told_and_end_no_other(home, monkeypatch):
    """They are not repeated, nor is anything told apart from them; if all fail, so does the study."""
    advance = packs.advance

    def failing(runs, steps, *_):
        if any(run.spec.loss.name in failed for run in runs):
            raise RuntimeError("can't allocate memory")
        return advance(runs, steps)

    monkeypatch.setattr(packs, "advance", failing)
    failed = {"ldr"}
    result = study(tiny_study(over={}, expect=[LDR, {**LDR, "better": "aldr-kl"}]))
    assert {key[0] for key in result.outcome.failures} == {"ldr"}
    assert result.outcome.verdicts[0].note == "2 of 2 pairs lack a value of eval/accuracy"
    assert not result.outcome.verdicts[1].note
    assert study(read_study_spec(result.folder), resume=result.folder).outcome.failures
    failed = {"ldr", "aldr-kl", "cross-entropy"}
    with pytest.raises(RunError, match=r"6 of 6 trainings failed; .*: can't allocate memory"):
        study(tiny_study(over={}))


# What is left behind


def test_a_study_is_tracked_with_a_run_for_each_variant_and_setting(home):
    """Values seed by seed with their mean; verdicts are tags, documents and pictures artifacts."""
    from mlflow import MlflowClient

    spec = tiny_study(expect=[LDR], entries=["ldr"], yardsticks=["eval/accuracy"])
    result = study(spec)
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    parent = client.get_run(result.folder.run_id)
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    found = {run.info.run_name: run for run in client.search_runs([parent.info.experiment_id], below)}
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}

    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lossworks.verdict"] == result.outcome.word
    assert parent.data.tags["lossworks.verdict.1"].startswith(
        f"{result.outcome.verdicts[0].word}: ldr better than"
    )
    assert {"lossworks.entry.ldr"} <= set(parent.data.tags)
    assert parent.data.metrics["trainings/ended"] == 12
    assert {"spec.yaml", "study.json", "study.png", "study.svg", "results.jsonl"} <= files
    assert set(found) == {
        f"{variant} data.label_noise={noise}" for variant in spec.compare for noise in ("0", "0.5")
    }
    run = found["ldr data.label_noise=0.5"]
    points = client.get_metric_history(run.info.run_id, "eval/accuracy")
    setting = result.outcome.plan.settings[1]
    values = result.outcome.values("ldr", [setting], "eval/accuracy")
    assert {point.step: point.value for point in points} == dict(enumerate(values.values()))
    assert run.data.metrics["mean/eval/accuracy"] == pytest.approx(np.mean(list(values.values())))
    assert run.data.params["loss.name"] == "ldr"
    assert run.data.params["seed"] == "[0, 1]"


def test_pictures_show_every_variant_and_verdict(home):
    """As far as a program can look at them; all words are in the SVG as well."""
    result = study(tiny_study(expect=[LDR], claim="LDR is better."))
    png, svg = result.pictures
    content = png.read_bytes()
    width, height = struct.unpack(">II", content[16:24])

    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert width == 1800
    assert 600 <= height <= 2000
    assert ET.parse(svg).getroot().tag.endswith("svg")  # noqa: S314
    comments = svg.read_text()
    for word in ("cross-entropy", "aldr-kl", "eval/brier", "data.label_noise=0.5", "LDR is better."):
        assert f"<!-- {word} -->" in comments
