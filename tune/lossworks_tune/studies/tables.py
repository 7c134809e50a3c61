"""The tables of a study: means over seeds, and differences to the first variant, as text."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lossworks.metrics.intervals import MeanInterval
from lossworks_tune.studies.outcome import StudyOutcome, Verdict
from lossworks_tune.studies.plan import Setting

EXPLANATION = (
    "Mean over seeds ± half the width of its 95 % interval (Student's t); in brackets the difference to the "
    "first row, paired by seed."
)
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Variants as rows, settings or yardsticks as columns.

    Attributes:
        title: The yardstick, or nothing where the columns are yardsticks.
        columns: Heads of the columns behind the first, which has the variants.
        rows: Cells of each row, the variant's name first.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(outcome: StudyOutcome) -> list[Table]:
    """Return a table a yardstick, with a column a setting; one table of all yardsticks for one setting."""
    settings, yardsticks = outcome.plan.settings, outcome.yardsticks
    if len(settings) == 1:
        return [_table(outcome, "", [(name, settings[0], name) for name in yardsticks])]
    return [
        _table(outcome, name, [(setting.title, setting, name) for setting in settings]) for name in yardsticks
    ]


def _table(outcome: StudyOutcome, title: str, columns: list[tuple[str, Setting, str]]) -> Table:
    cells = [list(_column(outcome, setting, yardstick)) for _, setting, yardstick in columns]
    rows = zip(outcome.plan.variants, *cells, strict=True)
    return Table(title, tuple(head for head, _, _ in columns), tuple(tuple(row) for row in rows))


def _column(outcome: StudyOutcome, setting: Setting, yardstick: str) -> Iterator[str]:
    first, *others = outcome.plan.variants
    means = {variant: outcome.mean(variant, setting, yardstick) for variant in (first, *others)}
    form = form_of(mean for mean in means.values() if mean is not None)
    for variant, mean in means.items():
        if mean is None:
            yield MISSING
            continue
        gap = None if variant == first else outcome.difference(variant, first, [setting], yardstick)
        yield mean.text(form) + (f" ({signed(gap, form)})" if gap is not None else "")


def form_of(means: Iterable[MeanInterval]) -> str:
    """Return a format with four digits behind the point, or fewer where numbers are large."""
    largest = max((abs(mean.value) for mean in means), default=0.0)
    digits = 4 if largest < 1 else max(0, 3 - int(math.log10(largest)))
    return f"{{:.{digits}f}}"


def signed(mean: MeanInterval, form: str) -> str:
    """Return a difference with its sign and the half width of its interval."""
    return mean.text(form.replace("{:", "{:+z")).replace("± +", "± ")


def of_verdict(verdict: Verdict) -> str:
    """Return a verdict in words: what was expected, and the difference that was found."""
    found = verdict.difference
    shown = f": {signed(found, form_of([found]))}" if found is not None else ""
    note = f" ({verdict.note})" if verdict.note else ""
    return f"{verdict.expectation}{shown}{note}"


def failures(outcome: StudyOutcome) -> str:
    """Return which trainings failed and why the first did, in words; empty if none did."""
    found = outcome.failures
    if not found:
        return ""
    (variant, setting, seed), why = next(iter(found.items()))
    where = ", ".join(part for part in (variant, setting, f"seed {seed}") if part)
    return f"{len(found)} of {len(outcome.plan.trainings)} trainings failed; the first, {where}: {why}"


def markdown(table: Table) -> str:
    """Return a table in Markdown."""
    head = f"| {table.title} | {' | '.join(table.columns)} |"
    rule = "| --- |" + " --- |" * len(table.columns)
    return "\n".join([head, rule, *(f"| {' | '.join(row)} |" for row in table.rows)])
