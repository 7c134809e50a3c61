"""``lossworks submit`` and ``lossworks jobs``."""

import argparse
import os
import re
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

from lossworks.cli import Command, program
from lossworks.errors import UserError
from lossworks_jobs.kubernetes.manifest_command import add_manifest_arguments
from lossworks_jobs.submission.job_server import DEFAULT_ADDRESS, JobServer

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

    from lossworks_jobs.submission.job_server import JobEnd

_EPILOG = """\
SPEC is any that train, tune or federate take, with the same overrides. Local files that it names are sent
along. Ctrl-C leaves the job running; `lossworks jobs stop` asks it for a checkpoint before it ends."""


def _add_address(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS)
    parser.add_argument(
        "--address",
        default=default,
        help=f"job server of the Ray cluster, http://HOST:PORT (default {default})",
    )


def _configure_submit(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("spec", nargs="?", metavar="SPEC", help="YAML file; optional with RUN")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="fields that replace the spec's"
    )
    _add_address(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run of the cluster, or with a job's")
    parser.add_argument("--detach", action="store_true", help="don't wait for the job")
    package = parser.add_mutually_exclusive_group()
    package.add_argument(
        "--no-package", action="store_true", help="use the cluster's own installation of Lossworks"
    )
    package.add_argument(
        "--install", action="store_true", help="let Ray install requirements.lock on every node"
    )
    parser.add_argument(
        "--python", metavar="PATH", help="the cluster's interpreter; default: one that has Ray"
    )
    parser.add_argument("--home", metavar="DIR", help="folder on the cluster for runs, shared by all nodes")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the job"
    )
    parser.add_argument("--no-upload", action="store_true", help="paths in the spec are the cluster's")
    parser.add_argument(
        "--upload-limit",
        type=float,
        default=100.0,
        metavar="MIB",
        help="most local data to send (default 100)",
    )
    parser.add_argument(
        "--graceful",
        type=int,
        default=120,
        metavar="S",
        help="seconds for a checkpoint when stopped (default 120)",
    )
    add_manifest_arguments(parser)


def _submit(arguments: argparse.Namespace) -> int:
    from lossworks_jobs.kubernetes.manifest_command import manifest
    from lossworks_jobs.submission.bundle import make_bundle
    from lossworks_jobs.submission.submit import SubmitOptions, submit

    if (arguments.spec is None) == (arguments.resume is None):
        raise UserError("give SPEC, a YAML file such as jobs/specs/demo.yaml, or --resume RUN")
    options = SubmitOptions(
        package=not arguments.no_package,
        install=arguments.install,
        python=arguments.python,
        home=arguments.home,
        environment=_variables(arguments.env),
        graceful_s=arguments.graceful,
    )
    bundle = None
    if arguments.spec is not None:
        limit = round(arguments.upload_limit * 2**20)
        upload = not (arguments.no_upload or arguments.manifest)
        bundle = make_bundle(arguments.spec, arguments.overrides, upload=upload, limit=limit)
    if arguments.manifest:
        if bundle is None:
            raise UserError(
                f"--manifest {arguments.manifest}: needs SPEC; a job that is applied again goes on"
            )
        print(manifest(arguments, bundle, options.environment), end="")
        return 0
    server = JobServer(arguments.address)
    job = submit(server, bundle, arguments.resume, options)
    sent = f", {bundle.size / 2**20:.1f} MiB of files with it" if bundle and bundle.uploads else ""
    print(f"job {job} at {server.address}{sent}", flush=True)
    if options.install:
        print("the nodes install requirements.lock first, once for all jobs, which takes minutes", flush=True)
    if arguments.detach:
        print(f"its output: {program()} jobs logs {job} --follow --address {server.address}")
        return 0
    return _follow(server, job)


def _variables(given: list[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals or not name.isidentifier():
            raise UserError(f"--env {name}: write it as NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _follow(server: JobServer, job: str) -> int:
    """Print a job's output until it ends, and a summary; return its exit status."""
    from lossworks_jobs.submission.job_entry import RUN_LINE

    printed: list[str] = []

    def write(text: str) -> None:
        if text:
            print(text, end="", flush=True)
            printed.append(text)

    try:
        end = server.follow(job, write)
    except KeyboardInterrupt:
        print(f"\njob {job} goes on: {program()} jobs logs {job} --follow --address {server.address}")
        print(f"to end it: {program()} jobs stop {job} --address {server.address}")
        return 130
    run = re.search(rf"^{RUN_LINE}(.*)$", "".join(printed), re.MULTILINE)
    _summarize(server, job, end, run.group(1) if run else None)
    return end.exit_status


def _summarize(server: JobServer, job: str, end: "JobEnd", run: str | None) -> None:
    from lossworks.reporting import print_summary

    facts = [("exit status", str(end.exit_status)), *([("run", run)] if run else [])]
    if end.status == "FAILED" and not run and end.message:
        facts.append(("message", " ".join(end.message.split())[-300:]))
    commands = [("all its output", f"{program()} jobs logs {job} --address {server.address}")]
    if end.status != "SUCCEEDED" and run:
        commands.append(("go on", f"{program()} submit --resume {job} --address {server.address}"))
    print_summary(f"job {job} {end.status.lower()}", facts, commands)


def _configure_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "status", "logs", "stop"), help="what to do")
    parser.add_argument("job", nargs="?", metavar="JOB", help="id of a job, or the beginning of one")
    _add_address(parser)
    parser.add_argument("--follow", action="store_true", help="with logs: go on until the job ends")


def _jobs(arguments: argparse.Namespace) -> int:
    if (arguments.job is None) != (arguments.action == "list"):
        raise UserError(
            "list takes no JOB; status, logs and stop take one: `lossworks jobs list` shows the ids"
        )
    server = JobServer(arguments.address)
    if arguments.action == "list":
        _print_jobs(server.jobs())
        return 0
    found = server.find(arguments.job)
    job = str(found.submission_id)
    if arguments.action == "logs" and arguments.follow:
        return _follow(server, job)
    if arguments.action == "logs":
        print(server.logs(job), end="")
        return 0
    return _stop(server, job) if arguments.action == "stop" else _print_status(server, found)


def _print_jobs(jobs: "list[JobDetails]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("job", "command", "status", "started", "took", box=None, header_style="bold")
    for job in jobs:
        command = (job.metadata or {}).get("command", "")
        table.add_row(str(job.submission_id), command, job.status.value, _started(job), _took(job))
    Console(highlight=False).print(table if jobs else "no jobs yet")


def _print_status(server: JobServer, job: "JobDetails") -> int:
    """Print what is known of a job; return its exit status, or 0 while it goes on."""
    from lossworks.reporting import print_summary

    facts = [
        ("started", _started(job)),
        ("took", _took(job)),
        ("says", " ".join((job.message or "").split())[:300]),
    ]
    print_summary(f"job {job.submission_id} {job.status.value.lower()}", facts, [])
    end = server.end(str(job.submission_id))
    return end.exit_status if end else 0


def _stop(server: JobServer, job: str) -> int:
    """Stop a job and wait until it has ended."""
    if (end := server.end(job)) is not None:
        raise UserError(f"job {job}: has ended already ({end.status.lower()})")
    server.stop(job)
    print("asked for a checkpoint and the end; waiting for it", file=sys.stderr)
    while (end := server.end(job)) is None:
        time.sleep(0.5)
    print(f"job {job} {end.status.lower()}")
    return 0


def _started(job: "JobDetails") -> str:
    if not job.start_time:
        return ""
    return datetime.fromtimestamp(job.start_time / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _took(job: "JobDetails") -> str:
    if not job.start_time:
        return ""
    seconds = ((job.end_time or time.time() * 1000) - job.start_time) / 1000
    return f"{seconds / 60:.0f} min" if seconds > 300 else f"{seconds:.0f} s"


SUBMIT = Command(
    "send a spec to a Ray cluster and follow it there",
    _configure_submit,
    _submit,
    group="machines and servers",
)
JOBS = Command(
    "list, look at and stop the jobs of a Ray cluster", _configure_jobs, _jobs, group="machines and servers"
)
