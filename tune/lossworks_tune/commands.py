"""``lossworks tune``."""

import argparse
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs.fields import add_spec_options, show_spec

if TYPE_CHECKING:
    from lossworks.runs import RunFolder
    from lossworks_tune.sweeps.spec import SweepSpec

_EPILOG = """\
SPEC is a YAML file such as tune/specs/label-noise.yaml; every field can be overridden, as in trials=100
search=tpe scheduler=asha base.data.label_noise=0.6 losses=[cross-entropy,ldr] seeds=[0,1,2]. Ctrl-C ends the
sweep; --resume goes on, and repeats no trial that has ended."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="YAML file; optional with RUN")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields that replace the spec's"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a sweep that was interrupted")
    parser.add_argument("--address", help="Ray cluster to join, for engine=ray; default: a new one here")
    add_spec_options(parser)


def _run(arguments: argparse.Namespace) -> int:
    spec, resume = _resolve(arguments)
    if show_spec(spec, arguments):
        return 0
    from lossworks_tune.sweeps.run import sweep
    from lossworks_tune.sweeps.summary import SweepDisplay, show

    with SweepDisplay() as display:
        result = sweep(spec, resume=resume, address=arguments.address, listener=display)
    show(spec, result)
    return 0


def _resolve(arguments: argparse.Namespace) -> "tuple[SweepSpec, RunFolder | None]":
    from lossworks.runs import RunFolder
    from lossworks_tune.sweeps.run import read_sweep_spec, require_same
    from lossworks_tune.sweeps.spec import SweepSpec

    overrides = list(arguments.overrides)
    file = arguments.spec
    if file is not None and "=" in file:
        overrides.insert(0, file)
        file = None
    if not arguments.resume:
        if file is None:
            raise UserError(
                "SPEC is missing: give a YAML file such as tune/specs/label-noise.yaml, or --resume RUN"
            )
        return SweepSpec.read(file, overrides), None
    folder = RunFolder.find(arguments.resume)
    stored = read_sweep_spec(folder)
    asked = SweepSpec.read(file, overrides) if file is not None else stored.override(overrides)
    require_same(stored, asked)
    return asked, folder


TUNE = Command(
    "search losses and their hyperparameters, many trials at once", _configure, _run, group="train and search"
)
