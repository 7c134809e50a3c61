"""Memory, disks and limits of this machine, as far as this process may use them."""

import os
import resource
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from lossworks.home import QUIET_ENVIRONMENT, home_path
from lossworks_jobs.doctor.check import Area, Check

_AREA = Area("machine")
_GIB = 2**30
# A worker is a process with torch in it: about half a GiB before its model.
_LEAST_MEMORY, _MODEST_MEMORY = 1 * _GIB, 4 * _GIB
_LEAST_DISK, _MODEST_DISK = 1 * _GIB, 10 * _GIB
# Ray takes so much of the memory for its object store, and refuses to write to a disk fuller than that.
_OBJECT_STORE_SHARE, _RAY_FULLEST = 0.3, 0.95
_OPEN_FILES = 4096


def memory(available: int | None = None, limit: int | None = None) -> Check:
    """Check the memory in bytes that runs can have; ``limit`` is a container's, if it has one."""
    there = psutil.virtual_memory().available if available is None else available
    limit = container_limit() if limit is None else limit
    usable = min(there, limit) if limit else there
    swap = psutil.swap_memory()
    found = f"{usable / _GIB:.1f} GiB free"
    found += f", at most {limit / _GIB:.1f} GiB in this container" if limit else ""
    found += f", swap {swap.used / _GIB:.1f} of {swap.total / _GIB:.1f} GiB used"
    fix = "Close other programs, or use fewer workers."
    if usable < _LEAST_MEMORY:
        return _AREA.wrong("memory", found, fix)
    return _AREA.warn("memory", found, fix) if usable < _MODEST_MEMORY else _AREA.ok("memory", found)


def container_limit(file: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return the memory in bytes that a container may use, or None without a limit."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def shared_memory(folder: Path = Path("/dev/shm"), total: int | None = None) -> Check:  # noqa: S108
    """Check that Ray's object store fits into shared memory; it takes 30 % of ``total``, the memory."""
    if not folder.is_dir():
        return _AREA.ok("shared memory", "none; Ray keeps objects in files")
    total = psutil.virtual_memory().total if total is None else total
    size, wanted = shutil.disk_usage(folder).total, int(total * _OBJECT_STORE_SHARE)
    found = f"{size / _GIB:.1f} GiB in {folder}"
    if size >= wanted:
        return _AREA.ok("shared memory", found)
    return _AREA.warn(
        "shared memory",
        f"{found}; Ray would use {wanted / _GIB:.1f} and writes to disk instead",
        f"Start the container with --shm-size={wanted / _GIB:.0f}g.",
    )


def disk(name: str, folder: Path, *, ray: bool = False) -> Check:
    """Check the room in a folder; of one of Ray's, too, that its disk is not nearly full."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    full = 1 - usage.free / usage.total
    found, fix = f"{usage.free / _GIB:.1f} GiB free in {folder}", f"Remove files from the disk of {there}."
    if usage.free < _LEAST_DISK:
        return _AREA.wrong(name, found, fix)
    if ray and full > _RAY_FULLEST:
        found += f", {full:.0%} full, and Ray writes no objects to a disk more than {_RAY_FULLEST:.0%} full"
        return _AREA.warn(name, found, fix)
    return _AREA.warn(name, found, fix) if usage.free < _MODEST_DISK else _AREA.ok(name, found)


def disks() -> list[Check]:
    """Check the disks of the home folder, of temporary files, and of Ray's."""
    ray = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray")
    return [
        disk("home disk", home_path()),
        disk("temporary disk", Path(tempfile.gettempdir())),
        disk("Ray's disk", ray, ray=True),
    ]


def home_folder() -> Check:
    """Check that the home folder exists, or can be made, and takes files."""
    folder = home_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return _AREA.ok("home folder", str(folder))
    except OSError as error:
        found = f"{folder} can't be written: {error.strerror}"
        return _AREA.wrong("home folder", found, "Set LOSSWORKS_HOME to a folder of yours.")


def open_files(limits: tuple[int, int] | None = None) -> Check:
    """Check how many files a process may open; Ray raises the first limit to the second, the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    most = "no limit" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    found = f"{soft:,} at once, {most} on request"
    if hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES:
        return _AREA.ok("open files", found)
    return _AREA.warn(
        "open files", found, f"Raise the hard limit (`ulimit -Hn`) to {_OPEN_FILES} or more; Ray needs many."
    )


def usage_reports(environment: Mapping[str, str] = os.environ) -> Check:
    """Check that no library reports home; what is unset here is switched off when the library is started."""
    reports = {name: value for name, value in QUIET_ENVIRONMENT.items() if "PARALLELISM" not in name}
    on = [
        f"{name}={environment[name]}"
        for name in reports
        if environment.get(name, reports[name]) != reports[name]
    ]
    if not on:
        return _AREA.ok("usage reports", "off in Ray, MLflow, Flower and Hugging Face")
    return _AREA.warn(
        "usage reports",
        f"perhaps on: {', '.join(on)}",
        f"Unset {', '.join(one.split('=')[0] for one in on)}.",
    )
