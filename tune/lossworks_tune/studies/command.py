"""``lossworks study``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import LossworksError, RunError, UserError
from lossworks.specs.fields import add_spec_options, show_spec

if TYPE_CHECKING:
    from lossworks.runs import RunFolder
    from lossworks_tune.studies.run import StudyResult
    from lossworks_tune.studies.spec import StudySpec

_EPILOG = """\
STUDY is a name that `lossworks study` lists or a YAML file such as tune/studies/wrong-labels.yaml; every
field can be overridden, as in seeds=10 base.steps=200 over.data.label_noise=[0,0.3]. Without a file, --base
and --compare make one of your own spec: lossworks study --base my.yaml --compare cross-entropy,ldr
data.source=csv:flowers.csv; then fields are the base's unless they are the study's (seeds, over, expect,
yardsticks, name, tracking). Ctrl-C ends the study; --resume goes on, and repeats no training that has
ended."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("study", nargs="?", metavar="STUDY", help="name or YAML file; none lists all names")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields that replace the study's"
    )
    parser.add_argument("--base", metavar="FILE", help="spec to vary, in place of a study's file")
    parser.add_argument("--compare", metavar="LOSS,LOSS,…", help="losses to compare; others to the first")
    parser.add_argument("--seeds", metavar="N", help="how many seeds, or which: 0,1,2")
    parser.add_argument("--resume", metavar="RUN", help="go on with a study that was interrupted")
    parser.add_argument("--address", help="Ray cluster to join, where trainings can't be packed")
    add_spec_options(parser)
    parser.add_argument(
        "--record", action="store_true", help="keep the results beside the study, and write docs/evidence.md"
    )
    parser.add_argument("--all", action="store_true", help="run and record all studies that `study` lists")
    parser.add_argument(
        "--only-page", action="store_true", help="write docs/evidence.md from the results that are kept"
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.only_page:
        from lossworks_tune.studies import page

        print(page.write())
        return 0
    if arguments.all:
        return _run_all(arguments)
    if not (arguments.study or arguments.base or arguments.resume):
        from lossworks_tune.studies.summary import print_studies

        print_studies()
        return 0
    spec, resume = _resolve(arguments)
    if show_spec(spec, arguments):
        return 0
    if arguments.record:
        _require_recordable(arguments)
    result = _study(spec, resume, arguments.address)
    if arguments.record:
        print(_record(arguments.study, result))
    return 0


def _study(spec: "StudySpec", resume: "RunFolder | None", address: str | None) -> "StudyResult":
    from lossworks_tune.studies.run import study
    from lossworks_tune.studies.summary import StudyDisplay, show

    with StudyDisplay() as display:
        result = study(spec, resume=resume, address=address, listener=display)
    show(result)
    return result


def _run_all(arguments: argparse.Namespace) -> int:
    """Run every study; one that fails ends no other."""
    from lossworks_tune.studies import shipped
    from lossworks_tune.studies.spec import StudySpec

    if arguments.study or arguments.base or arguments.resume:
        raise UserError("--all: runs all studies as they are; give no study, --base or --resume with it")
    shipped.evidence_page()
    failed = []
    for name, file in shipped.files().items():
        try:
            _record(name, _study(StudySpec.read(file), None, arguments.address))
        except LossworksError as error:
            failed.append(f"{name}: {error}")
    if failed:
        raise RunError(f"{len(failed)} studies failed: {'; '.join(failed)}")
    return 0


def _require_recordable(arguments: argparse.Namespace) -> None:
    from lossworks_tune.studies import shipped

    overridden = [*arguments.overrides, *(name for name in ("compare", "seeds") if getattr(arguments, name))]
    if arguments.study not in shipped.files() or arguments.resume or overridden:
        raise UserError("--record: is for a study that `lossworks study` lists, as it is, by its name")
    shipped.evidence_page()


def _record(name: str, result: "StudyResult") -> Path:
    """Keep a study's results beside it and write the page; return the page."""
    import shutil

    from lossworks_tune.studies import page, shipped

    kept = shipped.results_of(shipped.files()[name])
    kept.parent.mkdir(exist_ok=True)
    shutil.copyfile(result.document, kept)
    return page.write()


def _resolve(arguments: argparse.Namespace) -> "tuple[StudySpec, RunFolder | None]":
    from lossworks.runs import RunFolder
    from lossworks_tune.studies.run import read_study_spec
    from lossworks_tune.studies.shipped import find
    from lossworks_tune.studies.spec import StudySpec

    overrides = list(arguments.overrides)
    name = arguments.study
    if name is not None and "=" in name:
        overrides.insert(0, name)
        name = None
    if arguments.resume:
        if name or overrides or arguments.base or arguments.compare or arguments.seeds:
            raise UserError("--resume: goes on with the spec that the study was started with; give no other")
        folder = RunFolder.find(arguments.resume)
        return read_study_spec(folder), folder
    own = [f"compare=[{arguments.compare}]"] if arguments.compare else []
    own += [f"seeds={_seeds(arguments.seeds)}"] if arguments.seeds else []
    if arguments.base is None:
        if name is None:
            raise UserError("STUDY is missing: give its name or file, or --base FILE --compare LOSS,LOSS")
        return StudySpec.read(find(name), [*own, *overrides]), None
    if name is not None:
        raise UserError(f"{name}: is a study, which has a base of its own; give it or --base, not both")
    return StudySpec.around(arguments.base, [*own, *overrides]), None


def _seeds(text: str) -> str:
    numbers = text.split(",")
    if not all(number.strip().isdigit() for number in numbers):
        raise UserError(f"--seeds {text}: give how many, such as 5, or which, such as 0,1,2")
    return text if len(numbers) == 1 else f"[{text}]"


STUDY = Command(
    "compare variants over seeds, and judge what was expected of them",
    _configure,
    _run,
    group="train and search",
)
