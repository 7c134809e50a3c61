"""Nodes for ``ray up``, Ray's cluster launcher: machines one has, or machines of a cloud.

Nodes ask for Ray's token, which travels as a file over SSH and is never part of the YAML. The dashboard runs
what it is sent, so it listens on the head's loopback only: ``ray dashboard FILE`` makes a tunnel to it.
"""

import ipaddress
import re
from collections.abc import Sequence
from typing import Any, Literal

from lossworks.errors import UserError
from lossworks.home import QUIET_ENVIRONMENT
from lossworks_jobs.kubernetes.manifest import to_yaml

Provider = Literal["local", "aws"]

_TOKEN = "~/.ray/auth_token"  # noqa: S105  (a path, not a token)
_PORT = 6379


def cluster_yaml(
    name: str,
    *,
    provider: Provider = "local",
    head_ip: str | None = None,
    worker_ips: Sequence[str] = (),
    ssh_user: str = "ubuntu",
    ssh_private_key: str | None = None,
    setup: Sequence[str] = (),
    region: str = "us-west-2",
    head_type: str = "m5.large",
    worker_type: str = "g5.xlarge",
    workers: int = 1,
    token_file: str = _TOKEN,
) -> str:
    """Return a file for ``ray up``.

    Args:
        name: Of the cluster.
        provider: ``local`` for machines that run already, ``aws`` for EC2 instances to start.
        head_ip: local: the head's address, which the workers reach.
        worker_ips: local: the other machines.
        ssh_user: Who logs in on the nodes.
        ssh_private_key: With which key; on EC2 Ray makes one where none is given.
        setup: Shell commands that install Lossworks on a node.
        region: aws: Where.
        head_type: aws: Instance type of the head, which trains nothing.
        worker_type: aws: Instance type of the workers.
        workers: aws: How many.
        token_file: On this machine; ``ray get-auth-token --generate`` makes one.

    Raises:
        UserError: Naming the argument, its value and what would be right.
    """
    if not re.fullmatch(r"[A-Za-z0-9][-_A-Za-z0-9]{0,62}", name):
        raise UserError(f"name={name!r}: give letters, digits, '-' and '_', 63 at most")
    auth = {"ssh_user": ssh_user} | ({"ssh_private_key": ssh_private_key} if ssh_private_key else {})
    if provider == "local":
        nodes = _machines(head_ip, worker_ips)
    elif provider == "aws":
        nodes = _instances(region, head_type, worker_type, workers)
    else:
        raise UserError(f"provider={provider}: use local or aws")
    head = (
        f"--head --port={_PORT} --dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    worker = f"--address=$RAY_HEAD_IP:{_PORT}"
    return to_yaml(
        [
            {
                "cluster_name": name,
                **nodes,
                "auth": auth,
                "file_mounts": {_TOKEN: token_file},
                "setup_commands": [f"chmod 600 {_TOKEN}", *setup],
                "head_start_ray_commands": _start(f"{head}{' --num-cpus=0' if provider == 'aws' else ''}"),
                "worker_start_ray_commands": _start(worker),
            }
        ]
    )


def _start(options: str) -> list[str]:
    quiet = " ".join(f"{key}={value}" for key, value in QUIET_ENVIRONMENT.items())
    return ["ray stop", f"RAY_AUTH_MODE=token {quiet} ray start {options}"]


def _machines(head_ip: str | None, worker_ips: Sequence[str]) -> dict[str, Any]:
    if head_ip is None:
        raise UserError("head_ip: is missing; provider=local needs the address of the head")
    addresses = [head_ip, *worker_ips]
    for address in addresses:
        _require_address(address)
    if len(set(addresses)) < len(addresses):
        raise UserError(f"worker_ips={', '.join(worker_ips)}: each machine once, and not the head")
    return {
        "max_workers": len(worker_ips),
        "provider": {"type": "local", "head_ip": head_ip, "worker_ips": list(worker_ips)},
    }


def _require_address(address: str) -> None:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        if re.fullmatch(r"(?!-)[-A-Za-z0-9.]{1,253}", address) and not re.fullmatch(r"[0-9.]+", address):
            return
        raise UserError(f"{address!r}: is neither an IP address nor a host's name") from None


def _instances(region: str, head_type: str, worker_type: str, workers: int) -> dict[str, Any]:
    if workers < 1:
        raise UserError(f"workers={workers}: must be at least 1")
    return {
        "max_workers": workers,
        "provider": {"type": "aws", "region": region, "cache_stopped_nodes": False},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": head_type}},
            "worker": {
                # Ray Train takes all workers at once, so all of them are there from the start.
                **dict.fromkeys(("min_workers", "max_workers"), workers),
                "resources": {},
                "node_config": {"InstanceType": worker_type},
            },
        },
    }
