"""A process that joins a Ray cluster, or asks a job server, and prints what it saw as one line of JSON."""

import contextlib
import json
import logging
import sys
from typing import Any

from lossworks.adapters.ray_private import version_at
from lossworks.home import prepare_process

_COUNTED = ("CPU", "GPU")


def main() -> None:
    """Print what the address on the command line leads to."""
    address = sys.argv[1]
    prepare_process()
    try:
        seen = _job_server(address) if address.startswith("http") else _cluster(address)
    except Exception as error:  # noqa: BLE001  (whatever Ray raises is what the user must hear)
        seen = {"error": " ".join(str(error).split())[:300] or type(error).__name__}
    print(json.dumps(seen))


def _job_server(address: str) -> dict[str, Any]:
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(address)
    client.list_jobs()  # the version is told to everybody; this needs the token
    return {"ray": version_at(client), "jobs": address}


def _cluster(address: str) -> dict[str, Any]:
    import ray

    context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        seen = {
            "ray": ray.__version__,  # Ray itself refuses to join with another version of itself or of Python
            "nodes": len(alive),
            "resources": {name: total[name] for name in _COUNTED if name in total},
        }
        if context.dashboard_url:
            with contextlib.suppress(Exception):
                seen["jobs"] = _job_server(f"http://{context.dashboard_url}")["jobs"]
        return seen
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
