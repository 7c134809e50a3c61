"""The studies that come with Lossworks, by name, and the results of theirs that are kept beside them."""

from pathlib import Path

from lossworks.errors import UserError, require_one


def folder() -> Path:
    """Return where they lie: beside the package in a checkout, inside it where a wheel is installed."""
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "studies"
    return beside if beside.is_dir() else package / "studies" / "shipped"


def files() -> dict[str, Path]:
    """Return the file of each by its name."""
    return {path.stem: path for path in sorted(folder().glob("*.yaml"))}


def find(name: str) -> Path:
    """Return the file of a study by its name, its path, or the one entry of the catalogue that it is about.

    Raises:
        UserError: There is none, or an entry has several.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = files()
    if not known:
        raise UserError(f"{name}: no study comes with this installation; give a YAML file")
    if name not in known and (about := _about(name)):
        if len(about) > 1:
            raise UserError(f"{name}: {len(about)} studies are about it; name one: {', '.join(about)}")
        return known[about[0]]
    return known[require_one(name, list(known), "study")]


def _about(entry: str) -> list[str]:
    """Return the names of the studies that are about an entry."""
    from lossworks_tune.studies.spec import StudySpec

    return [name for name, file in files().items() if entry in StudySpec.read(file).entries]


def results_of(file: Path) -> Path:
    """Return where the results of a study's file are kept; it need not exist."""
    return file.parent / "results" / f"{file.stem}.json"


def evidence_page() -> Path:
    """Return the page that is made of all results.

    Raises:
        UserError: This is no checkout of the sources, which alone have it.
    """
    page = folder().parents[1] / "docs" / "evidence.md"
    if not page.parent.is_dir():
        raise UserError(f"{page}: can't be written; results are kept in a checkout of the sources only")
    return page
