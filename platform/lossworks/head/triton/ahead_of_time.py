"""Compile every tile of the table for its target, without a GPU, and read what it takes.

``python -m lossworks.head.triton.ahead_of_time`` prints a Markdown table; ``--write docs/triton-kernels.md``
puts it between that file's markers. Arguments are specialised by Triton's own code for launches, so that what
is compiled is what a launch at the shape of :data:`SHAPE` would compile.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel, make_backend

from lossworks.adapters.triton_private import source_of_launch
from lossworks.errors import UserError
from lossworks.head.core.problem import Coefficients, Gradients, LinearProblem, Softmax
from lossworks.head.triton.calls import (
    KernelCall,
    fused_call,
    parts_of,
    row_gradients_call,
    row_sums_call,
    slab_call,
)
from lossworks.head.triton.tiles import TARGETS, CompileTarget, Kernel, Tile

BEGIN, END = "<!-- ahead of time: begin -->", "<!-- ahead of time: end -->"

# Rows, classes and features of Gemma 2 2B in Wijmans et al. (arXiv:2411.09009, table 1).
SHAPE = (8192, 256000, 2304)

_COMPILERS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What ptxas calls the architecture that has the instructions Triton uses.
_ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


@dataclass(frozen=True)
class CompiledCase:
    """A kernel to compile; ``full`` switches all its options on, else it is plain cross-entropy."""

    target: CompileTarget
    kernel: Kernel
    dtype: torch.dtype
    tile: Tile
    full: bool


@dataclass(frozen=True)
class KernelResources:
    """What a compiled kernel takes.

    Attributes:
        name: The kernel's.
        registers: A thread's, in 32 bits.
        spilled: Bytes spilled to memory and read back (NVIDIA), vector registers spilled (AMD).
        shared: Bytes of shared memory.
        product: The matrix instruction, "" if there is none.
        atomics: Whether there is an atomic instruction.
        narrow: How many offsets are products in 32 bits.
    """

    name: str
    registers: int
    spilled: int
    shared: int
    product: str
    atomics: bool
    narrow: int


def cases() -> Iterator[CompiledCase]:
    """Yield every entry of the table that a GPU may get, lean ones plain and the others with all options."""
    for name in _COMPILERS:
        for (kernel, width), tiles in TARGETS[name].tiles.items():
            for tile in tiles:
                yield CompiledCase(TARGETS[name], kernel, _DTYPES[width], tile, full=not tile.lean)


def measure(case: CompiledCase) -> list[KernelResources]:
    """Compile the kernels of a case.

    Raises:
        UserError: Triton interprets in this process.
    """
    if triton.knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET=1 is set, and interpreted kernels can't be compiled; unset it")
    return [_read(_compile(call, case.target.name), case.target.name) for call in _calls(case)]


def table(cases: Iterable[CompiledCase]) -> str:
    """Return a Markdown table of what each case takes."""
    titles = ["target", "kernel", "dtype", "rows × classes × features", "warps, stages", "options"]
    titles += ["registers", "spilled", "shared bytes", "product"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases:
        t, heads = case.tile, ", two heads" if case.kernel == "teacher" else ""
        lines += [
            f"| {case.target.name} | {r.name}{heads} | {str(case.dtype).removeprefix('torch.')} "
            f"| {t.rows} × {t.classes} × {t.features} | {t.warps}, {t.stages} "
            f"| {'all' if case.full else 'none'} | {r.registers} | {r.spilled} | {r.shared:,} | {r.product} |"
            for r in measure(case)
        ]
    return "\n".join(lines)


def _calls(case: CompiledCase) -> list[KernelCall]:
    """Return the calls of a case, on tensors without memory."""
    rows, classes, features = SHAPE
    student = _problem(case, features)
    other = _problem(case, features * 2) if case.kernel == "teacher" else None
    softmax = Softmax(_vector(rows), _vector(classes, torch.bool)) if case.full else Softmax()
    if case.kernel == "row_gradients":
        e, slab = torch.empty(rows, features, device="meta"), _slab(case)
        return [row_gradients_call(student, slab, student.c[: slab.shape[1]], e, case.tile)]
    if case.kernel == "fused":
        return [_fused(case, student, softmax)]
    sums = row_sums_call(
        student, softmax, other, case.tile, case.target.programs,
        expected=case.full or other is not None, sums=case.full and other is None,
        predicted=case.full and other is None,
    )  # fmt: skip
    if case.kernel == "row_sums":
        return [sums]
    row = _vector(rows)
    rich = Coefficients(row, row, row, row, row, _vector(classes))
    coefficients = rich if case.full and other is None else Coefficients(softmax=row, target=row)
    parts = parts_of(coefficients, row, row)
    filled = slab_call(student, softmax, parts, other, _slab(case), 0, case.tile)
    return [filled] if other is None else [sums, filled]


def _slab(case: CompiledCase) -> Tensor:
    return torch.empty(SHAPE[0], 16384, dtype=case.dtype, device="meta")


def _problem(case: CompiledCase, features: int) -> LinearProblem:
    rows, classes, _ = SHAPE
    e = torch.empty(rows, features, dtype=case.dtype, device="meta")
    c = torch.empty(classes, features, dtype=case.dtype, device="meta")
    targets = _vector(rows, torch.int64)
    return (
        LinearProblem(e, c, targets, _vector(classes), 30.0, _vector(rows))
        if case.full
        else LinearProblem(e, c, targets)
    )


def _fused(case: CompiledCase, problem: LinearProblem, softmax: Softmax) -> KernelCall:
    rows, classes, features = SHAPE
    e, c = (_vector(size * features).view(size, features) for size in (rows, classes))
    sums = Gradients(e, c, _vector(classes) if case.full else None)
    masses = (_vector(rows), _vector(classes))
    parts = parts_of(Coefficients(softmax=_vector(rows), target=_vector(rows)), _vector(rows), None)
    return fused_call(
        problem, softmax, parts, _vector(classes, torch.int32), sums, masses, 2.0**-12, case.tile
    )


def _vector(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _compile(call: KernelCall, target: str) -> CompiledKernel:
    compiler = _COMPILERS[target]
    source, options = source_of_launch(call.kernel, make_backend(compiler), call.arguments)
    return triton.compile(source, target=compiler, options=options)


def _read(kernel: CompiledKernel, target: str) -> KernelResources:
    hip = _COMPILERS[target].backend == "hip"
    registers, spilled = _amd_registers(kernel) if hip else _nvidia_registers(kernel, _COMPILERS[target].arch)
    code = kernel.asm["amdgcn" if hip else "ptx"]
    product = re.search(r"v_mfma\w+|wgmma\.mma_async|mma\.sync|tcgen05\.mma", code)
    return KernelResources(
        name=kernel.metadata.name.removesuffix("_kernel"),
        registers=registers,
        spilled=spilled,
        shared=kernel.metadata.shared,
        product=product.group() if product else "",
        atomics=re.search(r"_atomic_|\b(atom|red)\.", code) is not None,
        narrow=len(re.findall(r"arith\.muli .*: tensor<.*xi32>", kernel.asm["ttir"])),
    )


def _amd_registers(kernel: CompiledKernel) -> tuple[int, int]:
    return _number(r"\.vgpr_count:\s+(\d+)", kernel.asm["amdgcn"]), _number(
        r"\.vgpr_spill_count:\s+(\d+)", kernel.asm["amdgcn"]
    )


def _nvidia_registers(kernel: CompiledKernel, arch: Any) -> tuple[int, int]:
    """Return what the assembler says of registers; the compiler itself reports them on a GPU only."""
    assembler = "ptxas-blackwell" if arch >= 100 else "ptxas"
    executable = str(Path(triton.__file__).parent / "backends/nvidia/bin" / assembler)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        options = ["-v", f"--gpu-name={_ARCHITECTURES[arch]}", "-o", f"{folder}/kernel.cubin"]
        command = [executable, *options, str(source)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    return _number(r"Used (\d+) registers", log), spilled


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(
            f"The compiler's output has no {pattern!r}; it has changed with Triton {triton.__version__}"
        )
    return int(found.group(1))


def main() -> None:
    """Print the table, or write it into a file between its markers."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels for each target without a GPU.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the table between FILE's markers")
    file = parser.parse_args().write
    text = table(cases())
    if file is None:
        print(text)
        return
    before, after = file.read_text().split(BEGIN)[0], file.read_text().split(END)[1]
    file.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
