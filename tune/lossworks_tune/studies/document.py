"""A study's results as one JSON document, from which tables, verdicts and pages are made again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossworks.errors import UserError
from lossworks.files import write_atomically
from lossworks.metrics.intervals import MeanInterval
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.store import Key, Result, decoded, encoded


def document(outcome: StudyOutcome) -> dict[str, Any]:
    """Return all values of a study, and what follows from them."""
    return {
        "study": outcome.spec.name,
        "digest": outcome.spec.digest,
        "verdict": outcome.word,
        "verdicts": [
            {
                "expectation": str(verdict.expectation),
                "verdict": verdict.word,
                "difference": _of_mean(verdict.difference),
                "note": verdict.note,
            }
            for verdict in outcome.verdicts
        ],
        "means": list(_means(outcome)),
        "values": [_of_result(outcome, key, result) for key, result in sorted(outcome.results.items())],
    }


def write(outcome: StudyOutcome, path: Path) -> Path:
    """Write a study's document."""
    text = json.dumps(document(outcome), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text + "\n")
    return path


def read(spec: StudySpec, path: Path) -> StudyOutcome:
    """Return what a document holds.

    Raises:
        UserError: It is of other trainings than the study has now.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    if values["digest"] != spec.digest:
        raise UserError(f"{path}: holds results of another {spec.name}; run the study again")
    results: dict[Key, Result] = {
        (line["variant"], line["setting"], line["seed"]): Result(
            decoded(line["metrics"]), line.get("failure", "")
        )
        for line in values["values"]
    }
    return StudyOutcome(spec, spec.make_plan(), results)


def _means(outcome: StudyOutcome) -> Any:
    first = outcome.plan.variants[0]
    for setting in outcome.plan.settings:
        for variant in outcome.plan.variants:
            for yardstick in outcome.yardsticks:
                gap = outcome.difference(variant, first, [setting], yardstick) if variant != first else None
                yield {
                    "variant": variant,
                    "setting": setting.title,
                    "yardstick": yardstick,
                    "mean": _of_mean(outcome.mean(variant, setting, yardstick)),
                    "difference_to_first": _of_mean(gap),
                }


def _of_mean(mean: MeanInterval | None) -> Mapping[str, Any] | None:
    if mean is None:
        return None
    return {"value": mean.value, "half_width": mean.half_width, "seeds": mean.count}


def _of_result(outcome: StudyOutcome, key: Key, result: Result) -> dict[str, Any]:
    metrics = {name: result.metrics[name] for name in outcome.yardsticks if name in result.metrics}
    line = {"variant": key[0], "setting": key[1], "seed": key[2], "metrics": encoded(metrics)}
    return line | ({"failure": result.failure} if result.failure else {})
