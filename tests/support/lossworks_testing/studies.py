"""Small studies for tests."""

from typing import Any

from lossworks_testing.classification import tiny
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.store import Result


def tiny_study(**changes: Any) -> StudySpec:
    """Return a study of seconds: three losses, clean and wrong labels; changes replace whole fields."""
    base = tiny(data={"source": "digits"}, model={"width": 8, "layers": 1}, steps=8, evaluation={"every": 8})
    values: dict[str, Any] = {
        "base": base,
        "compare": ["cross-entropy", "ldr", "aldr-kl"],
        "over": {"data.label_noise": [0, 0.5]},
        "seeds": 2,
    }
    return StudySpec.parse({**values, **changes})


def outcome_of(spec: StudySpec, values: dict[str, list[float]]) -> StudyOutcome:
    """Return an outcome with the values of variants, one a seed, of the first expectation's yardstick.

    They are the same in all settings, but for ``variant@title`` which are those of one setting alone.
    """
    plan = spec.make_plan()
    results = {}
    for training in plan.trainings:
        own = values.get(f"{training.variant}@{training.setting}", values.get(training.variant, []))
        place = plan.seeds.index(training.seed)
        if place < len(own):
            results[training.key] = Result({spec.expect[0].on: own[place]})
    return StudyOutcome(spec, plan, results)
