"""What a run or a measurement ran on: machine, versions, state of the source."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("lossworks", "torch", "ray", "mlflow", "numpy")


def machine(gpus: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what this machine is.

    Args:
        gpus: Names of the GPUs; without it the NVIDIA driver's list is read, which opens no GPU.

    Returns:
        ``cpu`` (model), ``cores`` (usable by this process), ``memory_gib``, ``platform``, ``python`` and
        ``gpus`` (a list of names).
    """
    return {
        "cpu": _cpu_model(),
        "cores": usable_cpus(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpus": list(gpus) if gpus is not None else _nvidia_gpus(),
    }


def machine_tags() -> dict[str, str]:
    """Return ``machine()`` as MLflow tags."""
    facts = machine()
    facts["gpus"] = ", ".join(facts["gpus"]) or "none"
    return {f"lossworks.machine.{name}": str(value) for name, value in facts.items()}


def version_tags() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run, as MLflow tags."""
    tags = {"lossworks.version.python": platform.python_version()}
    for package in _PACKAGES:
        try:
            tags[f"lossworks.version.{package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # Ray is optional
    return tags


def source_tags() -> dict[str, str]:
    """Return commit and state of the git repository around the working folder, as MLflow tags.

    Nothing is returned where there is no repository, no commit yet or no git.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    if not commit:
        return {}
    changes = _git("status", "--porcelain", "--untracked-files=no")
    # The first tag is MLflow's own: its pages show it as the run's version.
    return {"mlflow.source.git.commit": commit, "lossworks.git.dirty": str(bool(changes)).lower()}


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=5, check=True, env=_git_environment()
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def _git_environment() -> dict[str, str]:
    # Looking at the state must not write to the repository's index.
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _nvidia_gpus() -> list[str]:
    # Asking torch would open every GPU in the driver process, which only watches.
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
