"""``lossworks submit --manifest``: files that bring a spec to Kubernetes, or start nodes."""

import argparse
import hashlib
from collections.abc import Mapping

from lossworks.errors import UserError
from lossworks_jobs.submission.bundle import Bundle

MANIFESTS = ("rayjob", "cluster", "aws")


def add_manifest_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what only manifests need."""
    group = parser.add_argument_group("manifests")
    group.add_argument(
        "--manifest",
        choices=MANIFESTS,
        help="print a file instead of sending: a KubeRay RayJob that runs the spec, or a cluster for "
        "`ray up` on machines that run already or on EC2",
    )
    group.add_argument("--image", help="rayjob: image with Lossworks and this Ray")
    group.add_argument("--claim", help="rayjob: PersistentVolumeClaim for runs, shared by all pods")
    group.add_argument("--secret", help="rayjob: Secret whose keys become variables of the pods")
    group.add_argument(
        "--memory", type=int, default=8, metavar="GIB", help="rayjob: memory of a pod (default 8)"
    )
    group.add_argument("--head-ip", help="cluster: address of the head")
    group.add_argument(
        "--worker-ips", default="", help="cluster: addresses of the other machines, with commas"
    )
    group.add_argument("--ssh-user", default="ubuntu", help="cluster, aws: who logs in (default ubuntu)")


def manifest(arguments: argparse.Namespace, bundle: Bundle, environment: Mapping[str, str]) -> str:
    """Return the file that was asked for.

    Raises:
        UserError: Something for it is missing or wrong.
    """
    if bundle.command != "train":
        raise UserError(
            f"--manifest {arguments.manifest}: is for training specs; send this one to a running cluster"
        )
    if arguments.manifest == "rayjob":
        return _ray_job(arguments, bundle, environment)
    from lossworks_jobs.kubernetes.launcher import cluster_yaml
    from lossworks_jobs.kubernetes.manifest import job_name

    return cluster_yaml(
        job_name(bundle.name),
        provider="aws" if arguments.manifest == "aws" else "local",
        head_ip=arguments.head_ip,
        worker_ips=[address for address in arguments.worker_ips.split(",") if address],
        ssh_user=arguments.ssh_user,
        workers=bundle.values["workers"],
    )


def _ray_job(arguments: argparse.Namespace, bundle: Bundle, environment: Mapping[str, str]) -> str:
    import yaml

    from lossworks_jobs.kubernetes.manifest import POD_SPEC_FILE, job_name, ray_job

    if not arguments.image:
        raise UserError("--image is missing: name an image with Lossworks and this Ray")
    name, spec = job_name(bundle.name), yaml.safe_dump(bundle.values, sort_keys=False)
    # With the same key a job that Kubernetes starts again goes on with its run; another spec begins another.
    key = f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"
    return ray_job(
        name,
        spec,
        f"python -m lossworks_jobs.submission.job_entry --spec {POD_SPEC_FILE} --key {key}",
        image=arguments.image,
        workers=bundle.values["workers"],
        resources_per_worker=bundle.values["resources_per_worker"],
        claim=arguments.claim,
        environment=environment,
        secret=arguments.secret,
        graceful_s=arguments.graceful,
        memory_gib=arguments.memory,
    )
