"""A run as a KubeRay ``RayJob``: what ``kubectl apply -f`` needs to train on Kubernetes.

Everything is a pure function of its arguments; nothing here connects to a cluster. A worker is a pod of its
own, so Ray can't pack two onto one, and the head trains nothing. Secrets are never written: pods take them
from a Secret by its name. Ray's token authentication is on; the operator (KubeRay 1.5.1 or later) makes the
token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from lossworks.errors import UserError
from lossworks_jobs.kubernetes.pods import SPEC_FOLDER, Pods

POD_SPEC_FILE = f"{SPEC_FOLDER}/spec.yaml"

# The operator appends six characters for the cluster's name, which takes 53 at most.
_RAY_JOB_NAME = 47
_LARGEST_CONFIG_MAP = 1_000_000
_OBJECT_NAME = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
_SECRET = r"(?i)PASSW|TOKEN(?!IZERS)|SECRET|CREDENTIAL|PRIVATE|(API|ACCESS)_?KEY"  # noqa: S105  (a pattern)
_ADDRESS_WITH_PASSWORD = r"://[^\s/@]*:[^\s/@]*@"  # noqa: S105  (a pattern)


def ray_job(
    name: str,
    spec_yaml: str,
    entrypoint: str,
    *,
    image: str,
    workers: int,
    resources_per_worker: Mapping[str, float],
    claim: str | None,
    environment: Mapping[str, str],
    secret: str | None,
    graceful_s: int = 120,
    memory_gib: int = 8,
) -> str:
    """Return a ConfigMap with the spec and a RayJob that runs it, as YAML of two documents.

    Args:
        name: Of the job; see :func:`job_name`.
        spec_yaml: The whole resolved spec; the head sees it as :data:`POD_SPEC_FILE`.
        entrypoint: What the head runs, such as ``lossworks train /etc/lossworks/spec.yaml``.
        image: Has Lossworks and the Ray version of this installation.
        workers: Pods that train.
        resources_per_worker: Amounts as Ray counts them: whole CPUs (default 1) and GPUs, others as they are.
        claim: Of a PersistentVolumeClaim that all pods may write (ReadWriteMany); the home folder lies on it.
            None where the image mounts storage that all pods share in another way.
        environment: Variables of all pods; no secrets.
        secret: Name of a Secret whose keys become variables, such as MLFLOW_TRACKING_PASSWORD.
        graceful_s: Seconds that a run gets to save a checkpoint once it is asked to stop.
        memory_gib: Memory of a pod, requested and at most.

    Raises:
        UserError: Naming the argument, its value and what would be right.
    """
    name = job_name(name)
    _require_positive(workers=workers, graceful_s=graceful_s, memory_gib=memory_gib)
    _require_words(entrypoint=entrypoint, image=image)
    _require_objects(claim=claim, secret=secret)
    require_no_secrets(environment)
    pods = Pods(image, claim, environment, secret, graceful_s, memory_gib)
    config = _config_map(name, spec_yaml)
    job = {
        "entrypoint": entrypoint,
        # The operator sends the entry point to the head: no third pod that would need image and secret.
        "submissionMode": "HTTPMode",
        # Started again, a job goes on with the run that it began, if that lies on a volume that outlives it.
        "backoffLimit": 2 if claim else 0,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": False,
            "headGroupSpec": _head(pods, config["metadata"]["name"]),
            "workerGroupSpecs": [_workers(pods, workers, resources_per_worker)],
        },
    }
    return to_yaml(
        [
            config,
            {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(name, name), "spec": job},
        ]
    )


def job_name(name: str) -> str:
    """Return a name that is like ``name`` and that Kubernetes takes for a RayJob.

    It is lower case, begins with a letter, has hyphens for everything else, and 47 characters at most.

    Raises:
        UserError: Nothing of it can be kept.
    """
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    kept = re.sub(r"^(?=[0-9])", "run-", kept)[:_RAY_JOB_NAME].strip("-")
    if not kept:
        raise UserError(f"name={name!r}: has no letter or digit that a Kubernetes name could keep")
    return kept


def require_no_secrets(environment: Mapping[str, str]) -> None:
    """Refuse variables that would put a secret into a file.

    Raises:
        UserError: A name is none, or a name or an address in a value says that it holds a secret.
    """
    for name, value in environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"environment.{name}: is no name of a variable")
        if re.search(_SECRET, name) or re.search(_ADDRESS_WITH_PASSWORD, value):
            raise UserError(
                f"environment.{name}: looks like a secret, which manifests and dashboards show: set it "
                "in the nodes' environment (Kubernetes: a Secret) or in a file there (~/.mlflow/credentials)"
            )


def to_yaml(documents: Sequence[Mapping[str, Any]]) -> str:
    """Return documents as YAML, each after ``---``, with keys in the given order."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=110, explicit_start=True)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and no anchors: a person reads the result."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002  (the base class's signature)
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _metadata(name: str, instance: str) -> dict[str, Any]:
    return {
        "name": name,
        "labels": {"app.kubernetes.io/name": "lossworks", "app.kubernetes.io/instance": instance},
    }


def _config_map(name: str, spec_yaml: str) -> dict[str, Any]:
    if len(spec_yaml.encode()) > _LARGEST_CONFIG_MAP:
        raise UserError(f"spec {name}: has more than {_LARGEST_CONFIG_MAP:,} bytes, too many for a ConfigMap")
    metadata = _metadata(f"{name}-spec", name)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"spec.yaml": spec_yaml}}


def _head(pods: Pods, spec: str) -> dict[str, Any]:
    return {
        # A name within Kubernetes: the dashboard runs what it is sent, so nothing leads to it from outside.
        "serviceType": "ClusterIP",
        "enableIngress": False,
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
        "template": pods.template("ray-head", cpus=1, gpus=0, spec=spec),
    }


def _workers(pods: Pods, workers: int, resources: Mapping[str, float]) -> dict[str, Any]:
    cpus, gpus = _whole("CPU", resources, least=1), _whole("GPU", resources, least=0)
    others = {name: amount for name, amount in resources.items() if name not in {"CPU", "GPU"}}
    parameters = {"num-cpus": str(cpus), "num-gpus": str(gpus)}
    for name in others:
        # The rest is an argument of a shell's; memory has an argument of its own.
        if not re.fullmatch(r"[-A-Za-z0-9_.:/]+", name) or name in {"memory", "object_store_memory"}:
            raise UserError(f"resources_per_worker.{name}: can't be asked for on Kubernetes; leave it out")
    if others:
        parameters["resources"] = f"'{json.dumps(others)}'"  # a shell reads it
    return {
        "groupName": "workers",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), workers),
        "rayStartParams": parameters,
        "template": pods.template("ray-worker", cpus=cpus, gpus=gpus),
    }


def _whole(name: str, resources: Mapping[str, float], *, least: int) -> int:
    amount = resources.get(name, least)
    if amount != int(amount) or amount < least:
        raise UserError(
            f"resources_per_worker.{name}={amount:g}: on Kubernetes a worker is a pod of its own; give a "
            f"whole number, at least {least}"
        )
    return int(amount)


def _require_positive(**numbers: int) -> None:
    for what, number in numbers.items():
        if number < 1:
            raise UserError(f"{what}={number}: must be at least 1")


def _require_words(*, entrypoint: str, image: str) -> None:
    if not entrypoint.strip():
        raise UserError(f"entrypoint={entrypoint!r}: give the command that the head runs")
    if not re.fullmatch(r"[^\s'\"]+", image):
        raise UserError(f"image={image!r}: give one, such as registry.example/lossworks:1.0")


def _require_objects(**names: str | None) -> None:
    for what, name in names.items():
        if name is not None and not re.fullmatch(_OBJECT_NAME, name):
            raise UserError(f"{what}={name!r}: is no name of a Kubernetes object (a-z, 0-9, '-' and '.')")
