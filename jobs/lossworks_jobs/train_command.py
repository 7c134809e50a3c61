"""``lossworks train``."""

import argparse
import time
from pathlib import Path

import psutil

from lossworks.cli import Command
from lossworks.errors import UserError
from lossworks.runs import RunFolder
from lossworks.specs import RunSpec
from lossworks.specs.fields import add_spec_options, show_spec
from lossworks.tasks import read_train_spec

_EPILOG = """\
SPEC is a YAML file such as jobs/specs/demo.yaml, a language model, or jobs/specs/digits.yaml, a classifier
(task: classification); every field can be overridden, for instance data.corpus=text:notes.txt model.layers=6
sharding=fsdp. Ctrl-C saves a checkpoint and ends the run."""


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="YAML file; optional with RUN")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields that replace the spec's"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        metavar="RUN",
        help="go on with a run from its newest checkpoint; also ADDRESS/RUN of its checkpoint.mirror",
    )
    again.add_argument("--from-run", metavar="RUN", help="start a new run with the stored spec of another")
    parser.add_argument(
        "--address", help="Ray cluster to join, HOST:PORT or auto; default: $RAY_ADDRESS, or a new one here"
    )
    parser.add_argument(
        "--changed-data",
        action="store_true",
        help="with --resume: go on although the data are others now; classes, scales and tokenizer stay",
    )
    parser.add_argument(
        "--over-memory",
        action="store_true",
        help="start although the tensors alone are more than all memory of this machine",
    )
    _configure_plan(parser)
    parser.add_argument(
        "--profile", action="store_true", help="profile 3 steps; see profile.steps and profile.start"
    )
    parser.add_argument(
        "--plot-schedule",
        metavar="FILE",
        type=Path,
        help="draw the learning rate, and weights of losses that change, over all steps to FILE, .png or "
        ".svg (both are written), and end",
    )
    add_spec_options(parser)


def _configure_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print the memory, operations, time and disk that the run will take, and start nothing",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="with --plan: the memory there is, such as 16GiB: of the machine that all workers share, or of "
        "each worker's GPU; default: what is free here",
    )
    parser.add_argument(
        "--tokens-per-second",
        "--examples-per-second",
        dest="speed",
        metavar="N",
        help="with --plan: the speed of all workers together, from which the time follows",
    )
    parser.add_argument("--json", metavar="FILE", help="with --plan: write the plan there too")


def _run(arguments: argparse.Namespace) -> int:
    # The start of the process, so that the time to the first step counts the imports, too.
    started = psutil.Process().create_time()
    spec, resume = _resolve(arguments)
    if show_spec(spec, arguments):
        return 0
    if arguments.plan:
        from lossworks_jobs.training.planned import print_planned

        print_planned(spec, memory=arguments.memory, speed=arguments.speed, json=arguments.json)
        return 0
    for name in ("memory", "speed", "json"):
        if getattr(arguments, name) is not None:
            option = {"speed": "tokens-per-second"}.get(name, name)
            raise UserError(f"--{option} {getattr(arguments, name)}: is for --plan")
    if arguments.plot_schedule is not None:
        from lossworks.reporting.schedule_picture import draw_schedule

        print(f"drawn: {', '.join(map(str, draw_schedule(spec, arguments.plot_schedule)))}")
        return 0
    from lossworks.reporting import TrainProgress
    from lossworks_jobs.training.run_summary import print_run
    from lossworks_jobs.training.train import train

    before = time.time() - started
    with TrainProgress(spec.steps, first_step=_steps_done(resume)) as progress:
        result = train(
            spec,
            address=arguments.address,
            resume=resume,
            changed_data=arguments.changed_data,
            over_memory=arguments.over_memory,
            progress=progress,
        )
    print_run(spec, result, seconds_before=before)
    return 0 if result.outcome.status == "finished" else 130


def _steps_done(resume: RunFolder | None) -> int:
    from lossworks.tracking import last_step

    return (last_step(resume.journal) or 0) if resume else 0


def _resolve(arguments: argparse.Namespace) -> tuple[RunSpec, RunFolder | None]:
    """Return the spec to train and the run to go on with, if any.

    Raises:
        UserError: Neither a spec nor a run was given, or something in them is wrong.
    """
    overrides = list(arguments.overrides)
    file = arguments.spec
    if file is not None and "=" in file:
        overrides.insert(0, file)
        file = None
    if arguments.profile:
        overrides.insert(0, "profile=3")  # the user's own profile.steps comes later, and wins
    name = arguments.resume or arguments.from_run
    if arguments.changed_data and not arguments.resume:
        raise UserError("--changed-data: is for --resume; a new run reads its data as they are")
    if file is None and name is None:
        raise UserError("SPEC is missing: give a YAML file such as jobs/specs/demo.yaml, or --resume RUN")
    if file is not None and name is not None:
        raise UserError(f"{file}: a stored run brings its own spec; give overrides only")
    if name is None:
        return read_train_spec(file, overrides), None
    folder = _mirrored(name) if arguments.resume and "://" in name else RunFolder.find(name)
    return read_train_spec(folder.spec_file, overrides), folder if arguments.resume else None


def _mirrored(url: str) -> RunFolder:
    from lossworks.training.checkpoints.mirror import CheckpointMirror

    return CheckpointMirror(url).run_here()


TRAIN = Command(
    "train a model sharded over Ray workers, tracked in MLflow", _configure, _run, group="train and search"
)
