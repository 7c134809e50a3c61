"""``lossworks federate``."""

import argparse
from typing import TYPE_CHECKING

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.specs.fields import add_spec_options, show_spec

if TYPE_CHECKING:
    from lossworks.runs import RunFolder
    from lossworks_federated.specs import FederationSpec

_EPILOG = """\
SPEC is a YAML file such as federated/specs/digits.yaml; every field can be overridden, for instance
engine=flower rounds=100 split.alpha=0.1 strategies=[fedavg,scaffold] seeds=[0,1,2] faults.drop_out=0.3.
Ctrl-C ends the run; --resume goes on from the last finished round."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="YAML file; optional with RUN")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields that replace the spec's"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its last saved rounds")
    add_spec_options(parser)
    parser.add_argument(
        "--strategies", nargs="?", const="", metavar="NAME", help="list strategies, or print one in full"
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.strategies is not None:
        _print_strategies(arguments.strategies)
        return 0
    spec, resume = _resolve(arguments)
    if show_spec(spec, arguments):
        return 0
    from lossworks_federated.federate import federate
    from lossworks_federated.reporting.federation_summary import FederationDisplay, print_federation

    with FederationDisplay(spec.rounds) as display:
        result = federate(spec, resume=resume, watcher=display)
    print_federation(spec, result)
    return 1 if result.failed else 0


def _print_strategies(name: str) -> None:
    from lossworks.catalogue.tables import print_in_full, print_overview
    from lossworks_federated.strategies.catalogue import declaration, refused, strategies

    if name:
        print_in_full(declaration(name))
        return
    notes = ["`lossworks federate --strategies NAME` says more of one."]
    notes += [f"Left out: {slug}: {reason}" for slug, reason in refused().items()]
    print_overview(list(strategies().values()), notes)


def _resolve(arguments: argparse.Namespace) -> tuple["FederationSpec", "RunFolder | None"]:
    from lossworks.runs import RunFolder
    from lossworks_federated.server.session import read_session_spec
    from lossworks_federated.specs import FederationSpec

    if arguments.resume:
        if arguments.spec or arguments.overrides:
            given = arguments.spec or arguments.overrides[0]
            raise UserError(f"{given}: --resume goes on with the spec that the run was started with")
        folder = RunFolder.find(arguments.resume)
        return read_session_spec(folder), folder
    if arguments.spec is None or "=" in arguments.spec:
        raise UserError("SPEC is missing: give a YAML file such as federated/specs/digits.yaml")
    return FederationSpec.read(arguments.spec, arguments.overrides), None


FEDERATE = Command(
    "compare federated strategies over clients with unlike data", _configure, _run, group="train and search"
)
