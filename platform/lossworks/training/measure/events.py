"""What a run says in its logs while it goes on."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

from lossworks.logs import EVENTS, fields
from lossworks.specs import RunSpec
from lossworks.training.distributed.world import World
from lossworks.training.measure.hardware import Peak

_PACKAGES = ("lossworks", "torch", "numpy", "ray")


def started(spec: RunSpec, world: World, peak: Peak) -> None:
    """Say what runs where."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"
    EVENTS.info(
        "started",
        extra=fields(
            name=spec.name,
            world_size=world.size,
            device=device,
            threads=torch.get_num_threads(),
            sharding=spec.sharding.kind,
            precision=spec.precision,
            peak_flops=peak.flops,
            versions=_versions(),
        ),
    )


def restored(step: int, folder: Path) -> None:
    """Say where a run goes on from."""
    EVENTS.info("restored from a checkpoint", extra=fields(step=step, checkpoint=folder))


def evaluated(step: int, metrics: Mapping[str, float]) -> None:
    """Say what an evaluation found."""
    values = {name.removeprefix("eval/"): value for name, value in metrics.items()}
    EVENTS.info("evaluated", extra=fields(step=step, **values))


def saved(step: int, folder: Path, seconds: float) -> None:
    """Say that a checkpoint was written, and what it took."""
    size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    EVENTS.info("checkpoint written", extra=fields(step=step, seconds=seconds, bytes=size, checkpoint=folder))


def complained(step: int, text: str) -> None:
    """Pass on a complaint, such as about a spike of the loss."""
    EVENTS.warning("%s", text, extra=fields(step=step))


def stopping(step: int) -> None:
    """Say that the run was asked to stop."""
    EVENTS.info("stop requested", extra=fields(step=step))


def diverged(step: int, ranks: tuple[int, ...], text: str) -> None:
    """Say that a loss or gradient was not finite, and on which ranks."""
    EVENTS.error("%s", text, extra=fields(step=step, ranks=ranks))


def ended(step: int, status: str, reason: str, seconds: Mapping[str, float]) -> None:
    """Say how the run ended, and where its time went."""
    EVENTS.info("ended", extra=fields(step=step, status=status, reason=reason, seconds=dict(seconds)))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # Ray is optional
    return found
