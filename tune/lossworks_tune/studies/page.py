"""The evidence page: what all studies that come with Lossworks have found, made of their stored results."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from lossworks.catalogue.registry import declaration
from lossworks_tune.studies import document, shipped
from lossworks_tune.studies.outcome import StudyOutcome
from lossworks_tune.studies.plan import leaves
from lossworks_tune.studies.spec import StudySpec
from lossworks_tune.studies.tables import EXPLANATION, failures, markdown, of_verdict, tables

_UNTOLD = ("kind", "name", "tracking", "storage", "checkpoint")  # fields of a base that change no result
_HEAD = f"""# Evidence

Does a loss do on data what its paper says? Each study here is a file in `tune/studies/`: a claim, what is
compared, over which seeds, and what is expected. An expectation is *confirmed* where the 95 % interval of the
paired difference lies wholly on the claimed side, *contradicted* where it lies wholly on the other, and else
*not told apart*. A study is confirmed if all that it expects is, and contradicted if any of it is. These are
small models on small data, and of many intervals one in twenty misses.

{EXPLANATION}

`lossworks study --all` trains everything again and writes this page; all values are in
`tune/studies/results/`.
"""


def stored() -> Iterator[tuple[str, StudyOutcome]]:
    """Yield the studies that come with Lossworks by name, as far as results of theirs are kept.

    Raises:
        UserError: Results are of another study than the file holds now.
    """
    for name, file in shipped.files().items():
        results = shipped.results_of(file)
        if results.is_file():
            yield name, document.read(StudySpec.read(file), results)


def page(outcomes: Iterable[tuple[str, StudyOutcome]]) -> str:
    """Return the page of studies by name, in Markdown."""
    found = dict(outcomes)
    rows = [f"| [{name}](#{name}) | {one.word or '–'} | {one.spec.claim} |" for name, one in found.items()]
    overview = "\n".join(["| study | verdict | claim |", "| --- | --- | --- |", *rows])
    return "\n\n".join([_HEAD.rstrip(), overview, *(_section(*study) for study in found.items())]) + "\n"


def write() -> Path:
    """Write the page from the stored results, and return its file.

    Raises:
        UserError: This is no checkout of the sources, or results are of another study than its file.
    """
    file = shipped.evidence_page()
    file.write_text(page(stored()), encoding="utf-8")
    return file


def _section(name: str, outcome: StudyOutcome) -> str:
    spec = outcome.spec
    parts = [f"## {name}", spec.claim, *_sources(spec), _setting(outcome)]
    parts += [markdown(table) for table in tables(outcome)]
    if text := failures(outcome):
        parts.append(f"{text}.")
    parts.append("\n".join(f"- *{verdict.word}*: {of_verdict(verdict)}" for verdict in outcome.verdicts))
    parts.append(f"Verdict: **{outcome.word or 'none'}**. Again: `lossworks study {name}`")
    return "\n\n".join(part for part in parts if part)


def _sources(spec: StudySpec) -> list[str]:
    papers = [*([spec.paper] if spec.paper else []), *(str(declaration(s).paper) for s in spec.entries)]
    return [f"{'; '.join(dict.fromkeys(papers))}."] if papers else []


def _setting(outcome: StudyOutcome) -> str:
    spec = outcome.spec
    fields = {name: value for name, value in leaves(spec.base) if name.partition(".")[0] not in _UNTOLD}
    told = " ".join(f"{name}={value}" for name, value in fields.items())
    variants, first = (
        "; ".join(f"{name}: {_fields(fields)}" for name, fields in of.items())
        for of in (spec.compare, spec.first)
    )
    before = f" First, for each seed: {first}." if first else ""
    return f"Trained: `{told}`, over {len(spec.seeds)} seeds.{before} Compared: {variants}."


def _fields(fields: dict[str, object]) -> str:
    return "`" + " ".join(f"{name}={value}" for name, value in leaves(fields)) + "`"
