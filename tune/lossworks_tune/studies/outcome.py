"""What a study found: means over seeds, paired differences, and verdicts on what was expected."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lossworks.metrics.intervals import MeanInterval
from lossworks_tune.studies.plan import Setting, StudyPlan
from lossworks_tune.studies.spec import ExpectationSpec, StudySpec
from lossworks_tune.studies.store import Key, Result

Word = Literal["confirmed", "contradicted", "not told apart"]


@dataclass(frozen=True)
class Verdict:
    """What the results say of an expectation.

    Attributes:
        expectation: What was expected.
        word: confirmed: the 95 % interval of the paired difference lies wholly on the claimed side;
            contradicted: it lies wholly on the other side; not told apart: neither, or there is none.
        difference: First variant less the second in the yardstick's own unit, over seeds; None without pairs.
        note: Why there is no interval, if there is none.
    """

    expectation: ExpectationSpec
    word: Word
    difference: MeanInterval | None
    note: str = ""


@dataclass(frozen=True, eq=False)
class StudyOutcome:
    """What has been found so far.

    Attributes:
        spec: The study.
        plan: Its trainings.
        results: Of those that have ended.
    """

    spec: StudySpec
    plan: StudyPlan
    results: Mapping[Key, Result]

    @cached_property
    def yardsticks(self) -> tuple[str, ...]:
        """The yardsticks that are reported."""
        return self.spec.reported

    @property
    def failures(self) -> dict[Key, str]:
        """Why trainings failed, of those that did."""
        return {key: result.failure for key, result in self.results.items() if result.failure}

    def values(self, variant: str, settings: Sequence[Setting], yardstick: str) -> dict[int, float]:
        """Return a variant's value by seed, averaged over settings; without the seeds that lack any."""
        found = {}
        for seed in self.plan.seeds:
            ended = [self.results.get((variant, setting.title, seed)) for setting in settings]
            own = [result.metrics.get(yardstick, math.nan) if result else math.nan for result in ended]
            if all(map(math.isfinite, own)):
                found[seed] = sum(own) / len(own)
        return found

    def mean(self, variant: str, setting: Setting, yardstick: str) -> MeanInterval | None:
        """Return a variant's mean over seeds; None if there is no value."""
        return MeanInterval.of(list(self.values(variant, [setting], yardstick).values()))

    def difference(
        self, one: str, other: str, settings: Sequence[Setting], yardstick: str
    ) -> MeanInterval | None:
        """Return by how much a variant is above another, over the seeds of both; None without any."""
        ours, theirs = (self.values(variant, settings, yardstick) for variant in (one, other))
        return MeanInterval.of([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """What the results say of each expectation, in their order."""
        return [self._verdict(expectation) for expectation in self.spec.expect]

    @property
    def word(self) -> Word | None:
        """The verdict on the study: contradicted if anything is, confirmed if all is; None without any."""
        words = [verdict.word for verdict in self.verdicts]
        if not words:
            return None
        if "contradicted" in words:
            return "contradicted"
        return "confirmed" if set(words) == {"confirmed"} else "not told apart"

    def _verdict(self, expectation: ExpectationSpec) -> Verdict:
        settings = [setting for setting in self.plan.settings if setting.fits(expectation.where)]
        difference = self.difference(*expectation.variants, settings, expectation.on)
        note = self._without_interval(expectation, difference)
        if note or difference is None or difference.half_width is None:
            return Verdict(expectation, "not told apart", difference, note)
        sign = 1 if self.plan.yardsticks[expectation.on] == "max" else -1
        judge = _of_equal if expectation.equal is not None else _of_better
        return Verdict(
            expectation, judge(sign * difference.value, difference.half_width, expectation.by), difference
        )

    def _without_interval(self, expectation: ExpectationSpec, difference: MeanInterval | None) -> str:
        """Return why the seeds give no interval, or nothing if they do."""
        count, wanted = 0 if difference is None else difference.count, len(self.plan.seeds)
        if count < wanted:
            return f"{wanted - count} of {wanted} pairs lack a value of {expectation.on}"
        return "one seed gives no interval" if wanted == 1 else ""


def _of_better(gain: float, half_width: float, by: float) -> Word:
    if gain - half_width > by:
        return "confirmed"
    return "contradicted" if gain + half_width < by else "not told apart"


def _of_equal(difference: float, half_width: float, by: float) -> Word:
    if abs(difference) + half_width <= by:
        return "confirmed"
    return "contradicted" if abs(difference) - half_width > by else "not told apart"
