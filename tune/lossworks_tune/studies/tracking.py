"""A study in MLflow: below its run one for each variant in each setting, with its values seed by seed."""

import json
from pathlib import Path
from typing import Any

from lossworks.errors import RunError
from lossworks.files import write_atomically
from lossworks.runs import RunFolder
from lossworks.tracking import Journal, create_run, deliver, finish_run
from lossworks.tracking.store import TrackedStatus
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.plan import Setting, leaves
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.tables import of_verdict


class VariantRuns:
    """The runs of variants in settings, each entered when all of its seeds have ended.

    Args:
        outcome: The study, for what it trains.
        folder: Of its run.
    """

    def __init__(self, outcome: StudyOutcome, folder: RunFolder) -> None:
        plan = outcome.plan
        self._cells = [(variant, setting) for setting in plan.settings for variant in plan.variants]
        self._folder = folder

    def try_sync(self, outcome: StudyOutcome) -> str:
        """Enter what has ended; return what went wrong, in words, or nothing."""
        try:
            for number, (variant, setting) in enumerate(self._cells):
                folder = self._folder.path / "variants" / f"{number:03d}"
                if not (folder / "tracked").is_file() and self._has_ended(outcome, variant, setting):
                    folder.mkdir(parents=True, exist_ok=True)
                    self._enter(outcome, variant, setting, folder)
                    (folder / "tracked").touch()
        except RunError as error:
            return str(error)
        return ""

    def _has_ended(self, outcome: StudyOutcome, variant: str, setting: Setting) -> bool:
        return all((variant, setting.title, seed) in outcome.results for seed in outcome.plan.seeds)

    def _enter(self, outcome: StudyOutcome, variant: str, setting: Setting, folder: Path) -> None:
        run_id, tracking = folder / "run-id", outcome.spec.tracking
        if not run_id.is_file():
            write_atomically(run_id, self._create(outcome, variant, setting))
        journal = folder / "metrics.jsonl"
        _write(outcome, variant, setting, journal)
        deliver(tracking, run_id.read_text(encoding="ascii"), journal)
        failures = [why for key, why in outcome.failures.items() if key[:2] == (variant, setting.title)]
        status: TrackedStatus = "FAILED" if failures else "FINISHED"
        finish_run(
            tracking, run_id.read_text(encoding="ascii"), status, reason=failures[0] if failures else None
        )

    def _create(self, outcome: StudyOutcome, variant: str, setting: Setting) -> str:
        seeds = outcome.plan.seeds
        parameters = outcome.plan.training(variant, setting, seeds[0]).spec.flat()
        parameters["seeds" if "seed" not in parameters else "seed"] = list(seeds)
        return create_run(
            outcome.spec.tracking,
            name=" ".join(part for part in (variant, setting.title) if part)[:250],
            parameters=parameters,
            tags={"lossworks.kind": "variant", "lossworks.variant": variant},
            parent=self._folder.run_id,
        )


def _write(outcome: StudyOutcome, variant: str, setting: Setting, path: Path) -> None:
    """Write each seed's values, at the seed's place as step, and means and half widths with the last."""
    with Journal.open(path) as journal:
        for place, seed in enumerate(outcome.plan.seeds):
            metrics = outcome.results[variant, setting.title, seed].metrics
            journal.write(place, {name: metrics[name] for name in outcome.yardsticks if name in metrics})
        means = {name: outcome.mean(variant, setting, name) for name in outcome.yardsticks}
        found = {f"mean/{name}": mean.value for name, mean in means.items() if mean}
        found |= {
            f"half_width/{name}": mean.half_width
            for name, mean in means.items()
            if mean and mean.half_width is not None
        }
        journal.write(len(outcome.plan.seeds) - 1, found)


def parameters(spec: StudySpec) -> dict[str, Any]:
    """Return what MLflow is told of a study; names of variants are no names of parameters there."""
    whole = ("first", "compare", "over", "expect", "seeds", "yardsticks", "entries")
    values = spec.model_dump(mode="json")
    named = {name: json.dumps(values.pop(name), ensure_ascii=False) for name in whole}
    return {**dict(leaves(values)), **named}


def tags(outcome: StudyOutcome) -> dict[str, str]:
    """Return what a study's run is found by: its entries and its verdicts."""
    found = {f"lossworks.entry.{slug}": "" for slug in outcome.spec.entries}
    for number, verdict in enumerate(outcome.verdicts, 1):
        found[f"lossworks.verdict.{number}"] = f"{verdict.word}: {of_verdict(verdict)}"
    return found | ({"lossworks.verdict": outcome.word} if outcome.word else {})
