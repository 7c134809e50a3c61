"""The pods of a run on Kubernetes, which may do no more than an ordinary user's process."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lossworks.home import QUIET_ENVIRONMENT

HOME_MOUNT = "/lossworks"
SPEC_FOLDER = "/etc/lossworks"

# The user of Ray's own images; as the group of the claim's files, too, it may write there.
_USER = 1000


@dataclass(frozen=True)
class Pods:
    """What all pods of a run share.

    Attributes:
        image: Of their container.
        claim: Of a PersistentVolumeClaim that becomes the home folder, if any.
        environment: Variables, none of them secret.
        secret: Name of a Secret whose keys become variables, if any.
        graceful_s: Seconds from SIGTERM to SIGKILL.
        memory_gib: Requested and at most.
    """

    image: str
    claim: str | None
    environment: Mapping[str, str]
    secret: str | None
    graceful_s: int
    memory_gib: int

    def template(self, container: str, *, cpus: int, gpus: int, spec: str | None = None) -> dict[str, Any]:
        """Return a pod template.

        Args:
            container: Name of its container.
            cpus: Whole CPUs.
            gpus: Whole GPUs.
            spec: Name of the ConfigMap to mount at :data:`SPEC_FOLDER`, if any.
        """
        volumes = self._volumes(spec)
        main = {
            "name": container,
            "image": self.image,
            "env": self._variables(),
            **({"envFrom": [{"secretRef": {"name": self.secret}}]} if self.secret else {}),
            "resources": self._resources(cpus, gpus),
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            **({"volumeMounts": [mount for mount, _ in volumes]} if volumes else {}),
        }
        return {
            "spec": {
                "terminationGracePeriodSeconds": self.graceful_s,
                "automountServiceAccountToken": False,
                "securityContext": _ordinary_user(),
                "containers": [main],
                **({"volumes": [volume for _, volume in volumes]} if volumes else {}),
            }
        }

    def _variables(self) -> list[dict[str, str]]:
        """Return the variables of a container; given ones replace ours."""
        ours = {**QUIET_ENVIRONMENT, "RAY_JOB_STOP_WAIT_TIME_S": str(self.graceful_s)}
        if self.claim:
            ours["LOSSWORKS_HOME"] = HOME_MOUNT
        return [{"name": name, "value": value} for name, value in {**ours, **self.environment}.items()]

    def _resources(self, cpus: int, gpus: int) -> dict[str, Any]:
        amounts: dict[str, Any] = {"cpu": str(cpus), "memory": f"{self.memory_gib}Gi"}
        if gpus:
            amounts["nvidia.com/gpu"] = gpus
        return {"limits": amounts, "requests": amounts}

    def _volumes(self, spec: str | None) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return mounts, each with its volume."""
        found: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if self.claim:
            home = {"name": "home", "persistentVolumeClaim": {"claimName": self.claim}}
            found.append(({"name": "home", "mountPath": HOME_MOUNT}, home))
        if spec:
            mount = {"name": "spec", "mountPath": SPEC_FOLDER, "readOnly": True}
            found.append((mount, {"name": "spec", "configMap": {"name": spec}}))
        return found


def _ordinary_user() -> dict[str, Any]:
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "fsGroup": _USER,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
