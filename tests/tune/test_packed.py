"""Packed sweeps: repeatable, interrupted anywhere without loss, stopped early by Ray Tune's schedulers."""

import json

import pytest

from lossworks.errors import UserError
from lossworks.training.packed import PackedReport
from lossworks_testing.sweeps import packed, results, seen, sweep_at, tiny_sweep
from lossworks_testing.training import run_training
from lossworks_tune import packs
from lossworks_tune.sweeps.engines import packed as engine
from lossworks_tune.sweeps.engines.packed import PackedSweep
from lossworks_tune.sweeps.summary import gains

KINDS = ["none", "asha", "hyperband", "median", "pbt", "pb2"]
POPULATIONS = ("pbt", "pb2")
FAST_AND_SLOW = [pytest.param(kind, marks=pytest.mark.slow) if kind == "pb2" else kind for kind in KINDS]


def scheduled(kind, **changes):
    seeds = [0] if kind in POPULATIONS else [0, 1]
    scheduler = {"kind": kind, "reduction": 2}
    return tiny_sweep(scheduler=scheduler, seeds=seeds, trials=9, wilcoxon=0.0, **changes)


def test_trials_are_what_the_training_gives_alone(tmp_path):
    """Every seed's last metrics, whatever else was in the pack."""
    spec = tiny_sweep(trials=3, seeds=[0, 1])
    found = packed(spec, tmp_path / "sweep")

    for trial in found.trials[::3]:
        assert trial.status == "finished"
        for place, seed in enumerate(spec.seeds):
            values = found.space.values(trial.configuration.fields, seed)
            alone = run_training(values, None, str(tmp_path / f"{trial.configuration.number}-{seed}"))
            for name in ("eval/accuracy", "eval/cross_entropy", "eval/loss"):
                expected = pytest.approx(alone["metrics"][name], rel=2e-3, abs=1e-3)
                assert trial.finals[place][name] == expected


@pytest.mark.parametrize("kind", FAST_AND_SLOW)
def test_every_scheduler_ends_all_trials_and_repeats(kind, tmp_path):
    """The same spec, the same decisions; anchors come to the end, and what is stopped saves steps."""
    spec = scheduled(kind)
    found = packed(spec, tmp_path / "one")

    assert seen(found) == seen(packed(spec, tmp_path / "two"))
    assert len(found.trials) == 3 + 9
    assert {trial.status for trial in found.trials} <= {"finished", "stopped"}
    assert all(trial.status == "finished" for trial in found.trials if trial.configuration.anchor)
    stopped = [trial for trial in found.trials if trial.status == "stopped"]
    assert bool(stopped) == (kind in ("asha", "hyperband", "median"))
    assert all(trial.reason == f"by {kind}" for trial in stopped)
    best = max(trial.value("eval/accuracy") for trial in found.ranked)
    assert best > 0.3  # a tenth is guessing


@pytest.mark.parametrize("kind", FAST_AND_SLOW)
def test_an_interrupted_sweep_goes_on_to_the_same_result(kind, tmp_path, monkeypatch):
    """Stopped in several places, between any two saved states: as if nothing had happened."""
    spec = scheduled(kind, at_once=5 if kind in ("none", "asha") else None)
    expected = packed(spec, tmp_path / "whole")
    monkeypatch.setattr(engine, "_SAVE_S", 0.0 if kind in POPULATIONS else 1e9)
    calls, advance = [], packs.advance

    def interrupted(runs, steps, *_):
        calls.append(len(runs))
        if len(calls) in (2, 4):
            raise KeyboardInterrupt
        return advance(runs, steps)

    monkeypatch.setattr(packs, "advance", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            packed(spec, tmp_path / "parts")

    assert seen(packed(spec, tmp_path / "parts")) == seen(expected)


def test_no_finished_trial_is_trained_again(tmp_path, monkeypatch):
    """A sweep that is done trains nothing when it is gone on with; nor does confirming."""
    spec = tiny_sweep(trials=2)
    sweep = PackedSweep(sweep_at(spec, tmp_path))
    sweep.run()
    sweep.confirm(results(spec, tmp_path).to_confirm())
    expected = seen(results(spec, tmp_path))
    monkeypatch.setattr(packs, "advance", lambda runs, steps, *_: pytest.fail("trained again"))
    again = PackedSweep(sweep_at(spec, tmp_path))
    again.run()
    again.confirm(results(spec, tmp_path).to_confirm())

    assert seen(results(spec, tmp_path)) == expected


def test_a_damaged_state_is_passed_over(tmp_path):
    """The one before it, or none: the result is the same."""
    spec = scheduled("asha")
    expected = packed(spec, tmp_path)
    states = sorted((tmp_path / "state").glob("*.safetensors"))
    states[-1].write_bytes(b"half a file")
    assert seen(packed(spec, tmp_path)) == seen(expected)
    for state in states:
        state.write_bytes(b"")
    assert seen(packed(spec, tmp_path)) == seen(expected)


def test_a_configuration_that_fails_ends_no_other(tmp_path, monkeypatch):
    """Non-finite losses and errors of memory are kept with their reason."""
    spec, advance = tiny_sweep(trials=4), packs.advance

    def failing(runs, steps, *_):
        slugs = [run.spec.loss.name for run in runs]
        rates = [run.spec.optimizer.lr for run in runs]
        if max(rates) > 0.05:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        found = advance(runs, steps)
        return [
            PackedReport(7, {}, "the loss became NaN or infinite at step 7") if slug == "ldr" else report
            for slug, report in zip(slugs, found, strict=True)
        ]

    monkeypatch.setattr(packs, "advance", failing)
    found = packed(spec, tmp_path)
    failed = {trial.configuration.loss: trial for trial in found.trials if trial.status == "failed"}

    assert failed["ldr"].reason == "seed 0: the loss became NaN or infinite at step 7"
    assert [trial for trial in found.trials if trial.status == "finished"]
    large = [t for t in found.trials if t.configuration.fields.get("optimizer.lr", 0) > 0.05]
    assert large
    assert all("can't allocate memory" in trial.reason for trial in large)


def test_a_yardstick_that_is_not_measured_stops_the_sweep_at_once(tmp_path, monkeypatch):
    """Though it is declared: with the list of those that are measured."""
    monkeypatch.setattr(packs, "advance", lambda runs, *_: [PackedReport(4, {"eval/ece": 0.1}) for _ in runs])
    with pytest.raises(UserError, match=r"eval/accuracy: was not reported; reported are eval/ece"):
        packed(tiny_sweep(), tmp_path)


def test_seeds_that_are_worse_than_the_leaders_are_not_all_trained(tmp_path):
    """A learning rate of next to nothing is given up after four of six seeds, the fewest that can tell."""
    spec = tiny_sweep(
        losses=[{"name": "comp-sum", "tau": 1.0}],
        space={"optimizer.lr": [0.05, 1e-6]},
        search="grid",
        seeds=list(range(6)),
        at_once=1,
    )
    found = packed(spec, tmp_path)
    ends = {trial.configuration.fields.get("optimizer.lr"): trial for trial in found.trials}

    assert ends[0.05].status == "finished"
    assert ends[1e-6].reason == "worse than the leader on the same seeds"
    assert len(ends[1e-6].finals) == 4


def test_no_configuration_is_begun_after_the_time_is_over(tmp_path):
    """Those that had begun come to their end, also when the sweep is gone on with."""
    spec = tiny_sweep(trials=40, at_once=2, time_s=1e-9)
    found = packed(spec, tmp_path)

    assert 0 < len(found.trials) <= 2
    assert all(trial.status == "finished" for trial in found.trials)


def test_a_sweep_that_ended_by_its_time_goes_on_with_more(tmp_path):
    """What had ended stays as it was, and the rest is what the sweep would have been."""
    short = tiny_sweep(trials=6, at_once=2, time_s=1e-9)
    before = seen(packed(short, tmp_path / "sweep"))
    whole = tiny_sweep(trials=6, at_once=2, time_s=None)
    after = seen(packed(whole, tmp_path / "sweep"))

    assert after[: len(before)] == before
    assert len(before) < len(after) == 3 + 6
    assert after == seen(packed(whole, tmp_path / "at-once"))


def test_a_seed_that_failed_is_a_configuration_that_failed(tmp_path, monkeypatch):
    """Its other fresh seeds make it no winner; where all fail there is none, and the table says so."""
    spec = tiny_sweep(trials=4, confirm={"top": 2, "seeds": [50, 51, 52]})
    advance = packs.advance

    def failing(slugs):
        def found(runs, steps, *_):
            return [
                PackedReport(4, {}, "the loss became NaN or infinite at step 4")
                if run.spec.seed == 51 and run.spec.loss.name in slugs
                else report
                for run, report in zip(runs, advance(runs, steps), strict=True)
            ]

        return found

    def confirmed(path, slugs):
        monkeypatch.setattr(packs, "advance", failing(slugs))
        engine = PackedSweep(sweep_at(spec, path))
        engine.run()
        engine.confirm(results(spec, path).to_confirm())
        return results(spec, path)

    some = confirmed(tmp_path / "some", ("comp-sum",))
    lost = [trial for trial in some.confirmed if trial.configuration.loss == "comp-sum"]
    assert lost
    assert all(trial.status == "failed" and len(trial.finals) == 2 for trial in lost)
    assert all(trial.reason.startswith("seed 51: the loss became NaN") for trial in lost)
    assert some.winner is None or some.winner.configuration.loss == "ldr"
    assert all(some.fresh(trial, "eval/accuracy") is None for trial in lost)
    none = confirmed(tmp_path / "none", ("comp-sum", "ldr"))
    assert none.confirmed
    assert none.winner is None
    assert gains(none) == [("winner", "none: every configuration failed on fresh seeds")]


def test_packs_refill(tmp_path, monkeypatch):
    """With room for three, three are at work until there are no more."""
    sizes, advance = [], packs.advance
    monkeypatch.setattr(packs, "advance", lambda runs, s, *_: sizes.append(len(runs)) or advance(runs, s))
    found = packed(tiny_sweep(trials=9, at_once=3, scheduler="asha"), tmp_path)

    assert max(sizes) == 3
    assert len(found.trials) == 12


def test_widths_are_packed_apart_and_trained_all_the_same(tmp_path):
    """Architectures differ, so their runs can't be stacked; everything else goes on as ever."""
    found = packed(tiny_sweep(losses=["comp-sum"], space={"model.width": [4, 8, 16]}, trials=6), tmp_path)

    assert {trial.status for trial in found.trials} == {"finished"}
    assert len({trial.configuration.fields.get("model.width") for trial in found.trials}) > 2


@pytest.mark.parametrize("kind", POPULATIONS)
def test_population_based_training_hands_parameters_on(kind, tmp_path):
    """Some configurations end with others than they began with, and none outside its range."""
    spec = tiny_sweep(scheduler={"kind": kind, "grace_steps": 4}, trials=12)
    found = packed(spec, tmp_path)
    rates = [t.configuration.fields["optimizer.lr"] for t in found.trials if not t.configuration.anchor]
    drawn = {
        t.configuration.fields["optimizer.lr"]
        for t in packed(tiny_sweep(trials=12), tmp_path / "b").trials[3:]
    }

    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert set(rates) - drawn


def test_two_objectives_have_a_front(tmp_path):
    """None of it is beaten in both, and everything else is."""
    spec = tiny_sweep(
        objectives={"eval/accuracy": "max", "eval/ece": "min"}, search="nsga2", trials=12, at_once=4
    )
    found = packed(spec, tmp_path)
    points = [(trial.value("eval/accuracy"), trial.value("eval/ece")) for trial in found.front]

    assert found.front
    for trial in found.trials:
        accuracy, ece = trial.value("eval/accuracy"), trial.value("eval/ece")
        beaten = any(a >= accuracy and e <= ece and (a, e) != (accuracy, ece) for a, e in points)
        assert beaten != (trial in found.front)


def test_confirming_uses_fresh_seeds_for_the_best_and_what_it_is_compared_with(tmp_path):
    """Its finals are those of the training alone; the winner is named by them."""
    spec = tiny_sweep(trials=6, confirm={"top": 2, "seeds": [50, 51, 52]})
    sweep = PackedSweep(sweep_at(spec, tmp_path / "sweep"))
    sweep.run()
    sweep.confirm(results(spec, tmp_path / "sweep").to_confirm())
    found = results(spec, tmp_path / "sweep")
    again = {trial.configuration.number: trial for trial in found.confirmed}
    winner = again[found.winner.configuration.number]

    assert {trial.configuration.number for trial in found.ranked[:2]} <= set(again)
    assert found.baseline.configuration.number in again
    assert all(len(trial.finals) == 3 for trial in found.confirmed)
    assert winner.value("eval/accuracy") == max(t.value("eval/accuracy") for t in found.confirmed)
    values = spec.make_space().values(winner.configuration.fields, 51)
    alone = run_training(values, None, str(tmp_path / "alone"))
    assert winner.finals[1]["eval/accuracy"] == pytest.approx(alone["metrics"]["eval/accuracy"], abs=0.02)


def test_states_hold_plain_tensors_only(tmp_path):
    """Nothing of a run's folder is unpickled."""
    packed(tiny_sweep(trials=1), tmp_path)
    kinds = {path.suffix for path in tmp_path.rglob("*") if path.is_file()}

    assert kinds <= {".json", ".jsonl", ".safetensors"}
    assert json.loads((tmp_path / "trials" / "00000" / "end.json").read_text())["status"] == "finished"
