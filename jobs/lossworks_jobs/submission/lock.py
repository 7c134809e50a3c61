"""Whether what is installed on a cluster's nodes is what the sender's lock says."""

import re
from importlib.metadata import PackageNotFoundError, version

from lossworks.errors import UserError
from lossworks_jobs.submission.package import lock_file

# Of the lock, what decides whether a run works and what it computes; the rest follows from these.
_DECIDING = (
    "torch",
    "triton",
    "ray",
    "mlflow",
    "flwr",
    "optuna",
    "numpy",
    "pydantic",
    "tokenizers",
    "safetensors",
)


def locked_versions() -> dict[str, str]:
    """Return the deciding packages of the lock with their exact versions."""
    pins = dict(
        re.findall(r"^([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^\s;]+)", lock_file().read_text(), re.MULTILINE)
    )
    return {name: pins[name] for name in _DECIDING if name in pins}


def require_locked_versions() -> None:
    """Check the packages of this Python against the lock; builds of a version (``+cpu``) are alike.

    Raises:
        UserError: Naming every package that is missing or has another version.
    """
    wrong = []
    for name, wanted in locked_versions().items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "not installed"
        if found.partition("+")[0] != wanted.partition("+")[0]:
            wrong.append(f"{name} is {found} instead of {wanted}")
    if wrong:
        raise UserError(
            f"the cluster's packages are not those of requirements.lock: {'; '.join(wrong)}: "
            "install the lock in its image, submit with --install (Ray does it on each node) or --no-package"
        )
