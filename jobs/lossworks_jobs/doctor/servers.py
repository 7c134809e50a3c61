"""The servers that runs use: a Ray cluster, its job server, an MLflow store."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from lossworks.errors import LossworksError, UserError
from lossworks.home import QUIET_ENVIRONMENT, ray_token_given
from lossworks.ports import host_and_port, require_free_port, silence
from lossworks_jobs.doctor.check import Area, Check
from lossworks_jobs.doctor.installation import installed_version

_RAY, _STORE = Area("Ray"), Area("MLflow")
_PROBE_S = 9.0


def ray_checks(address: str | None) -> list[Check]:
    """Check the cluster or job server at ``address`` or RAY_ADDRESS, or that a cluster can start here."""
    if installed_version("ray") is None:
        return []  # said among the packages
    address = address or os.environ.get("RAY_ADDRESS") or None
    checks = [token(os.environ, address)]
    if address is None or address == "local":
        return [*checks, can_start()]
    refusal = unreachable(address)
    return [*checks, refusal] if refusal else [*checks, *cluster_checks(address, probe(address))]


def token(environment: Mapping[str, str], address: str | None = None) -> Check:
    """Check that Ray asks for a token, and, where there is a cluster, that there is one for it."""
    if environment.get("RAY_AUTH_MODE", "disabled").lower() != "token":
        found = "RAY_AUTH_MODE says not to ask for one: whoever reaches a Ray of ours can run code on it"
        return _RAY.warn("token", found, "Unset RAY_AUTH_MODE.")
    if ray_token_given():
        return _RAY.ok("token", "asked for, and here is one")
    if address is None or address == "local":
        return _RAY.ok("token", "each Ray that a run starts asks for one of its own")
    found = "none given; a cluster that asks for none lets whoever reaches it run code there"
    return _RAY.warn("token", found, "Start it with a token, and have the same in ~/.ray/auth_token.")


def can_start() -> Check:
    """Check that a cluster could listen on this machine's loopback; none is started."""
    try:
        require_free_port("127.0.0.1", 0, named="127.0.0.1")
    except UserError as error:
        return _RAY.wrong("cluster", str(error), "Allow this process to listen on loopback.")
    return _RAY.ok("cluster", f"none named; Ray {installed_version('ray')} starts one here with each run")


def unreachable(address: str) -> Check | None:
    """Return what is wrong if nothing listens at an address; Ray itself would try for a minute."""
    fix = "Start the cluster, or give the right --address HOST:PORT or http://HOST:PORT."
    server = host_and_port(address)
    if server is None:
        return None if address == "auto" else _RAY.wrong("cluster", f"{address} names no host and port", fix)
    reason = silence(*server)
    return _RAY.wrong("cluster", f"nothing answers at {address}: {reason}", fix) if reason else None


def probe(address: str) -> dict[str, Any]:
    """Return what a process of its own learns at an address; ``error`` if nothing, within some seconds.

    Joining a cluster can hang, can end the process, and can be done once in one.
    """
    command = [sys.executable, "-m", "lossworks_jobs.doctor.probe", address]
    environment = {**QUIET_ENVIRONMENT, **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_S, check=False, env=environment
        )
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen
    except subprocess.TimeoutExpired as error:
        # Ray goes on trying with a token that is refused, and says so in its log only.
        if b"InvalidAuthToken" in (error.stderr or b""):
            return {"error": "the cluster refuses our token, or we have none"}
        return {"error": f"what listens there is not Ray, or too busy: no answer in {_PROBE_S:g} s"}
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"error": last}


def cluster_checks(address: str, seen: Mapping[str, Any]) -> list[Check]:
    """Check what ``probe`` saw."""
    if "error" in seen:
        fix = "Use the cluster's versions of Python and Ray, RAY_AUTH_MODE=token and its token, here."
        return [_RAY.wrong("cluster", f"{address}: {seen['error']}", fix)]
    mine, theirs = installed_version("ray"), seen["ray"]
    checks = []
    if mine != theirs:
        fix = f"Run `pip install 'ray[default,train]=={theirs}'`, or bring the cluster to {mine}."
        checks.append(_RAY.wrong("cluster", f"{address}: Ray {theirs}, here {mine}", fix))
    elif "nodes" in seen:
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in seen["resources"].items())
        found = (
            f"{address}: {seen['nodes']} node{'s' * (seen['nodes'] != 1)}, {amounts}, Ray {theirs} as here"
        )
        checks.append(_RAY.ok("cluster", found))
    return [*checks, _job_server(seen)]


def _job_server(seen: Mapping[str, Any]) -> Check:
    if seen.get("jobs"):
        return _RAY.ok("job server", f"{seen['jobs']}, Ray {seen['ray']}")
    return _RAY.warn(
        "job server",
        "none: jobs can't be submitted",
        "Start the head with its dashboard (`pip install 'ray[default]'`, --include-dashboard=true).",
    )


def tracking_store(uri: str | None) -> Check:
    """Check that runs can be written to the MLflow store at ``uri``, or to the embedded one."""
    from lossworks.specs import TrackingSpec
    from lossworks.tracking import check_tracking, redact, tracking_uri

    try:
        spec = TrackingSpec.parse({"uri": uri})
        check_tracking(spec)
        shown = redact(tracking_uri(spec))
        if not shown.startswith("http"):
            return _STORE.ok("store", shown)
        _ask(spec)
    except LossworksError as error:
        fix = (
            "Start the server or correct --uri; user and password come from MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD or ~/.mlflow/credentials."
        )
        return _STORE.wrong("store", str(error), fix)
    return _STORE.ok("store", f"{shown} answers and lets us in")


def _ask(spec: Any) -> None:
    """Ask a server something that needs its permission; its health page needs none."""
    from lossworks.tracking.client import connect, store_errors

    client = connect(spec)
    with store_errors(spec):
        client.search_experiments(max_results=1)
