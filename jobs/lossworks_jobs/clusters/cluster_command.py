"""``lossworks cluster``."""

import argparse

from lossworks.cli import Command, program
from lossworks.errors import UserError
from lossworks.home import home
from lossworks.signals import stop_signals_interrupt


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Further machines join with `ray start --address HOST:PORT` and the same token; see docs/cluster.md."
    )
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="N", help="nodes, all on this machine (default 1)"
    )
    parser.add_argument(
        "--cpus", type=int, default=2, metavar="N", help="logical CPUs of each node (default 2)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address of this machine to listen on (default: this machine only)",
    )
    parser.add_argument(
        "--port", type=int, default=6379, help="port that drivers and nodes join (default 6379)"
    )
    parser.add_argument(
        "--dashboard-port", type=int, default=8265, help="port of the job server (default 8265)"
    )


def _run(arguments: argparse.Namespace) -> int:
    from lossworks_jobs.clusters.local_nodes import start_nodes

    for option in ("nodes", "cpus"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)}: must be at least 1")
    print(f"starting {arguments.nodes} node{'s' * (arguments.nodes > 1)}", flush=True)
    try:
        with (
            stop_signals_interrupt(),
            start_nodes(
                arguments.nodes,
                cpus=arguments.cpus,
                host=arguments.host,
                port=arguments.port,
                dashboard_port=arguments.dashboard_port,
                logs=home() / "cluster",
            ) as nodes,
        ):
            for index, process in enumerate(nodes.processes):
                print(f"node {index}: process {process.pid}")
            print(f"submit with: {program()} submit SPEC --address {nodes.jobs}")
            print(f"Prometheus finds the nodes by {nodes.discovery}")
            print(f"drivers join {nodes.gcs}; Ctrl-C ends all nodes", flush=True)
            nodes.wait()
    except KeyboardInterrupt:
        print("all nodes have ended")
    return 0


CLUSTER = Command(
    "start Ray nodes with a job server on this machine", _configure, _run, group="machines and servers"
)
