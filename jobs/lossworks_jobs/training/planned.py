"""``lossworks train SPEC --plan``."""

import importlib
from pathlib import Path

import psutil

from lossworks.errors import UserError
from lossworks.specs import RunSpec
from lossworks.specs.files import require_files

_OF_WORKERS = (
    "ray.train.torch",
    "lossworks.tracking",
    "lossworks.training.loop",
    "lossworks_jobs.training.prometheus",
)


def print_planned(spec: RunSpec, *, memory: str | None, speed: str | None, json: str | None) -> None:
    """Print what a run will take, and write it to a file if that is asked for.

    Args:
        spec: The run.
        memory: What there is, such as ``16GiB``; None for what is free here.
        speed: Tokens or examples a second; None if it isn't known.
        json: The file; None for none.

    Raises:
        UserError: An option says no size, no speed or no file, or the spec can't be planned.
    """
    from lossworks.training.planning.sizes import read_size

    size = None if memory is None else read_size(memory, "--memory")
    rate = None if speed is None else _speed(speed)
    if json is not None and not Path(json).absolute().parent.is_dir():
        raise UserError(f"--json {json}: is no file in an existing folder")
    base = base_bytes()
    from lossworks.training.weights.start import settled

    spec = settled(spec)
    require_files(spec)
    from lossworks.training.planning.plan import make_plan
    from lossworks.training.planning.plan_report import print_plan

    plan = make_plan(spec, memory=size, speed=rate, base_bytes=base)
    print_plan(plan)
    if json is not None:
        plan.write(Path(json))


def base_bytes() -> int:
    """Return the resident memory of a process with all that a worker imports, before it has a tensor."""
    for module in _OF_WORKERS:
        importlib.import_module(module)
    return int(psutil.Process().memory_info().rss)


def _speed(text: str) -> float:
    try:
        speed = float(text)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise UserError(f"--tokens-per-second {text}: must be a number above 0")
    return speed
