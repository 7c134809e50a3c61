"""Verdicts follow from paired differences over seeds and their Student-t interval, and from nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lossworks_testing.studies import outcome_of, tiny_study
from lossworks_tune.studies import document
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.store import Result
from lossworks_tune.studies.tables import failures, tables

ACCURACY, ECE = "eval/accuracy", "eval/ece"
LDR = {"better": "ldr", "than": "cross-entropy", "on": ACCURACY}


def verdict(expectation, ours, theirs):
    """Return the verdict on ldr against cross-entropy, from their values seed by seed."""
    seeds = max(len(ours), 2)
    spec = tiny_study(compare=["cross-entropy", "ldr"], over={}, seeds=seeds, expect=[expectation])
    return outcome_of(spec, {"ldr": ours, "cross-entropy": theirs}).verdicts[0]


def test_the_interval_is_students_of_the_paired_differences():
    """However much the seeds differ from one another."""
    rng = np.random.default_rng(0)
    theirs = rng.normal(size=6)
    ours = theirs + 0.1 + 0.02 * rng.normal(size=6)
    found = verdict(LDR, ours.tolist(), theirs.tolist()).difference
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)

    assert found.value - found.half_width == pytest.approx(expected.low)
    assert found.value + found.half_width == pytest.approx(expected.high)


@pytest.mark.parametrize(
    ("on", "by", "gap", "word"),
    [
        (ACCURACY, 0.0, 0.1, "confirmed"),
        (ACCURACY, 0.05, 0.1, "confirmed"),
        (ACCURACY, 0.1, 0.1, "not told apart"),
        (ACCURACY, 0.2, 0.1, "contradicted"),
        (ACCURACY, 0.0, -0.1, "contradicted"),
        (ACCURACY, 0.0, 0.0, "not told apart"),
        (ECE, 0.0, -0.1, "confirmed"),
        (ECE, 0.05, -0.1, "confirmed"),
        (ECE, 0.2, -0.1, "contradicted"),
        (ECE, 0.0, 0.1, "contradicted"),
    ],
)
def test_better_is_by_the_yardsticks_own_direction(on, by, gap, word):
    """The half width of these differences is 0.012."""
    theirs = [0.5, 0.6, 0.7, 0.4, 0.55]
    noise = [0.01, -0.01, 0.01, -0.01, 0.0]
    ours = [value + gap + error for value, error in zip(theirs, noise, strict=True)]

    assert verdict({**LDR, "on": on, "by": by}, ours, theirs).word == word


@pytest.mark.parametrize(
    ("gap", "by", "word"),
    [
        (0.0, 0.05, "confirmed"),
        (0.03, 0.05, "confirmed"),
        (-0.03, 0.05, "confirmed"),
        (0.05, 0.05, "not told apart"),
        (0.1, 0.05, "contradicted"),
        (-0.1, 0.05, "contradicted"),
    ],
)
def test_equal_is_an_interval_within_what_counts_as_none(gap, by, word):
    theirs = [0.5, 0.6, 0.7, 0.4, 0.55]
    noise = [0.01, -0.01, 0.01, -0.01, 0.0]
    ours = [value + gap + error for value, error in zip(theirs, noise, strict=True)]
    expectation = {"equal": "ldr", "to": "cross-entropy", "on": ACCURACY, "by": by}

    assert verdict(expectation, ours, theirs).word == word


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6))
def test_what_confirms_a_claim_contradicts_its_opposite(pairs):
    ours, theirs = map(list, zip(*pairs, strict=True))
    opposite = {"confirmed": "contradicted", "contradicted": "confirmed", "not told apart": "not told apart"}
    against = {"better": "cross-entropy", "than": "ldr", "on": ACCURACY}

    assert verdict(against, ours, theirs).word == opposite[verdict(LDR, ours, theirs).word]


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        ([0.9, 0.91], "3 of 5 pairs lack a value of eval/accuracy"),
        ([0.9, math.nan, 0.9, 0.91, 0.9], "1 of 5 pairs lack a value of eval/accuracy"),
        ([], "5 of 5 pairs lack a value"),
    ],
)
def test_nothing_is_told_apart_while_values_are_missing(ours, note):
    """Trainings that diverge flatter those that are left."""
    spec = tiny_study(compare=["cross-entropy", "ldr"], over={}, seeds=5, expect=[LDR])
    found = outcome_of(spec, {"ldr": ours, "cross-entropy": [0.1, 0.2, 0.1, 0.2, 0.1]}).verdicts[0]

    assert found.word == "not told apart"
    assert note in found.note


def test_one_seed_has_no_interval_and_it_is_said():
    spec = tiny_study(compare=["cross-entropy", "ldr"], over={}, seeds=1, expect=[LDR])
    found = outcome_of(spec, {"ldr": [0.9], "cross-entropy": [0.1]})

    assert found.word == "not told apart"
    assert found.verdicts[0].note == "one seed gives no interval"
    assert tables(found)[0].rows[1][1] == "0.9000 (+0.8000)"


def test_settings_that_an_expectation_does_not_name_are_averaged_seed_by_seed():
    expectations = [LDR, {**LDR, "where": {"data": {"label_noise": 0.5}}}]
    spec = tiny_study(compare=["cross-entropy", "ldr"], expect=expectations)
    values = {
        "cross-entropy": [0.5, 0.6],
        "ldr@data.label_noise=0": [0.7, 0.8],
        "ldr@data.label_noise=0.5": [0.6, 0.8],
    }
    whole, noisy = (verdict.difference for verdict in outcome_of(spec, values).verdicts)

    assert (whole.value, noisy.value) == pytest.approx((0.175, 0.15))
    assert whole.half_width == pytest.approx(stats.t.ppf(0.975, 1) * 0.025)


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ((0.1, 0.1), "confirmed"),
        ((0.1, 0.0), "not told apart"),
        ((0.1, -0.1), "contradicted"),
        ((0.0, -0.1), "contradicted"),
    ],
)
def test_a_study_is_confirmed_by_all_and_contradicted_by_any(gaps, word):
    spec = tiny_study(over={}, expect=[LDR, {**LDR, "better": "aldr-kl"}])
    values = {"cross-entropy": [0.5, 0.6]} | {
        name: [0.5 + gap, 0.601 + gap] for name, gap in zip(("ldr", "aldr-kl"), gaps, strict=True)
    }
    assert outcome_of(spec, values).word == word
    assert outcome_of(tiny_study(over={}, expect=[LDR]), values).word is not None
    assert StudyOutcome(tiny_study(), tiny_study().make_plan(), {}).word is None


def test_a_document_holds_all_that_tables_and_verdicts_are_made_of(tmp_path):
    """Written, read and written again it is the same; of another study it is refused."""
    spec = tiny_study(expect=[LDR])
    made = outcome_of(spec, {"ldr": [0.7, 0.8], "cross-entropy": [0.5, 0.6], "aldr-kl": [0.1, 0.2]})
    key = ("aldr-kl", "data.label_noise=0.5", 1)
    made = StudyOutcome(spec, made.plan, {**made.results, key: Result({}, "the loss became NaN")})
    file = document.write(made, tmp_path / "study.json")
    again = document.read(spec, file)

    assert document.document(again) == document.document(made)
    assert tables(again) == tables(made)
    assert failures(again) == (
        "1 of 12 trainings failed; the first, aldr-kl, data.label_noise=0.5, seed 1: the loss became NaN"
    )
    assert document.read(tiny_study(expect=[], claim="another"), file).results
    with pytest.raises(ValueError, match="holds results of another study; run the study again"):
        document.read(tiny_study(seeds=3), file)
