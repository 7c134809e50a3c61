"""What computes: CPUs, GPUs, and the compilers for both."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil

from lossworks.tracking import machine
from lossworks_jobs.doctor.check import Area, Check

_AREA = Area("computing")
_UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "amx_bf16": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
}


def cores(usable: int | None = None, quota: float | None = None) -> Check:
    """Check how many CPU cores this process may use; ``quota`` is a container's share of them."""
    usable = _usable_cores() if usable is None else usable
    quota = cpu_quota() if quota is None else quota
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    found = f"{usable} usable of {logical} logical, {physical} physical; {machine()['cpu']}"
    if quota is not None and quota < usable:
        found += f", but this container gets the time of {quota:g}"
        return _AREA.warn("CPU cores", found, f"Use {max(1, int(quota))} CPU in all workers together.")
    return _AREA.ok("CPU cores", found)


def cpu_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Return how many cores' time a container gets, or None without a limit."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max" is no number
        return None


def vector_units(flags: Sequence[str] | None = None, used: str | None = None) -> Check:
    """Check the CPU's vector units, and that torch uses the widest; ``used`` is torch's word for it."""
    flags = _cpu_flags() if flags is None else flags
    found = ", ".join(name for flag, name in _UNITS.items() if flag in flags) or "none known"
    used = _torch_capability() if used is None else used
    if platform.machine() not in ("x86_64", "AMD64"):
        return _AREA.ok("vector units", f"{found}; torch uses {used}")
    if "avx2" not in flags:
        return _AREA.warn("vector units", found, "Use a CPU with AVX2; torch is many times slower without.")
    if used == "DEFAULT":
        return _AREA.warn("vector units", f"{found}; torch uses none", "Unset ATEN_CPU_CAPABILITY.")
    return _AREA.ok("vector units", f"{found}; torch uses {used}")


def torch_build(threads: int | None = None, usable: int | None = None, nvidia: bool | None = None) -> Check:
    """Check torch's build and how many threads it computes with."""
    import torch

    threads = torch.get_num_threads() if threads is None else threads
    usable = _usable_cores() if usable is None else usable
    nvidia = nvidia_driver() is not None if nvidia is None else nvidia
    kind = "CUDA " + torch.version.cuda if torch.version.cuda else "CPU"
    kind = "ROCm " + torch.version.hip if torch.version.hip else kind
    found = f"{torch.__version__} for {kind}, {threads} thread{'s' * (threads != 1)}"
    if nvidia and kind == "CPU":
        fix = "Install torch's CUDA build (pytorch.org says how)."
        return _AREA.wrong("torch", f"{found}; the NVIDIA GPU here lies idle", fix)
    if threads < min(usable, psutil.cpu_count(logical=False) or 1):
        fix = "Unset OMP_NUM_THREADS; workers get their threads from their CPUs."
        return _AREA.warn("torch", f"{found} for {usable} cores", fix)
    return _AREA.ok("torch", found)


def nvidia_driver(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel driver, or None where there is none."""
    try:
        words = file.read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), "unknown")


def gpus() -> list[Check]:
    """Check each GPU: that torch can use it, and was built for it."""
    import torch

    driver = nvidia_driver()
    if torch.cuda.is_available():
        return [_gpu(index, driver) for index in range(torch.cuda.device_count())]
    if driver is not None and torch.version.cuda:
        found = f"driver {driver} and torch for CUDA {torch.version.cuda} don't fit"
        fix = f"Update NVIDIA's driver to one for CUDA {torch.version.cuda} or later."
        return [_AREA.wrong("GPUs", found, fix)]
    return [_AREA.ok("GPUs", "none; everything runs on the CPU")]


def _gpu(index: int, driver: str | None) -> Check:
    import torch

    facts = torch.cuda.get_device_properties(index)
    name = f"GPU {index}"
    found = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"
    if torch.version.hip:
        return _AREA.ok(name, found)
    found += f", capability {facts.major}.{facts.minor}, driver {driver or 'unknown'}"
    return fits(name, found, (facts.major, facts.minor), torch.cuda.get_arch_list())


def fits(name: str, found: str, capability: tuple[int, int], architectures: Sequence[str]) -> Check:
    """Check a GPU's capability against the architectures that torch was built for, such as ``sm_90``."""
    built = [int(one.removeprefix("sm_").rstrip("af")) for one in architectures if one.startswith("sm_")]
    mine = capability[0] * 10 + capability[1]
    # Code runs on later GPUs of the same generation; a later generation needs compute_ code.
    if any(one // 10 == capability[0] and one <= mine for one in built):
        return _AREA.ok(name, found)
    if any(one.startswith("compute_") for one in architectures):
        return _AREA.warn(name, f"{found}; compiled at first use", "Install a torch build for this GPU.")
    return _AREA.wrong(
        name, f"{found}; torch is built for {', '.join(architectures)}", "Install a torch build for this GPU."
    )


def triton_targets(folder: Path | None = None) -> Check:
    """Check which of the head's ahead-of-time targets the Triton here can compile for."""
    from lossworks.head.triton.tiles import TARGETS

    try:
        import triton
    except ImportError:
        return _AREA.warn("Triton", "not installed: heads on GPUs are slow", "Run `pip install triton`.")
    folder = Path(triton.__file__).parent / "backends" if folder is None else folder
    targets = [name for name in TARGETS if name != "interpreter"]
    able = [name for name in targets if _compiles_for(name, folder)]
    found = f"{triton.__version__} compiles for {', '.join(able) or 'no GPU'}"
    lacking = [name for name in targets if name not in able]
    if not lacking:
        return _AREA.ok("Triton", found)
    return _AREA.warn("Triton", f"{found}; not for {', '.join(lacking)}", "Install Triton's official wheel.")


def _compiles_for(target: str, folder: Path) -> bool:
    if target.startswith("gfx"):
        return (folder / "amd/compiler.py").is_file()
    assembler = "ptxas-blackwell" if int(target.removeprefix("sm_")) >= 100 else "ptxas"
    return os.access(folder / "nvidia/bin" / assembler, os.X_OK)


def cpp_compiler(command: str | None = None) -> Check:
    """Check that a C++ compiler is there and finds its headers; torch.compile builds CPU code with it."""
    command = command or os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    fix = "Install g++ or clang++ with its standard library, or set CXX."
    if command is None:
        return _AREA.warn("C++ compiler", "none: `compile: true` doesn't work", fix)
    check = [command, "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(
            check, input="#include <cmath>\n", capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return _AREA.warn("C++ compiler", f"{command}: {error}", fix)
    if done.returncode:
        first = (done.stderr.strip().splitlines() or ["fails"])[0]
        return _AREA.warn("C++ compiler", f"{command} compiles nothing: {first}", fix)
    return _AREA.ok("C++ compiler", command)


def _usable_cores() -> int:
    return int(machine()["cores"])


def _torch_capability() -> str:
    import torch

    return torch.backends.cpu.get_cpu_capability()


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = (
        line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features"))
    )
    return next(flags, [])
