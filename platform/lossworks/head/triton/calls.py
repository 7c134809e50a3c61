"""Kernels with their arguments: what a problem's tensors are to a kernel, and which tile it gets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head.core.problem import Coefficients, Gradients, LinearProblem, Softmax
from lossworks.head.triton import kernels
from lossworks.head.triton.tiles import TARGETS, CompileTarget, Kernel, Tile

# The fastest entry of the table, by kernel, leanness, device, dtype and binary magnitude of D.
_fastest: dict[tuple[Kernel, bool, torch.device, torch.dtype, int], Tile] = {}


class KernelCall(NamedTuple):
    """A kernel and its arguments."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def __call__(self) -> None:
        """Launch the kernel on the device of its arguments."""
        with torch.cuda.device_of(next(x for x in self.arguments.values() if isinstance(x, Tensor))):
            self.kernel[(self.programs,)](**self.arguments)


def row_sums_call(
    problem: LinearProblem,
    softmax: Softmax,
    other: LinearProblem | None,
    tile: Tile,
    programs: int,
    *,
    expected: bool,
    sums: bool,
    predicted: bool,
    walk: int | None = None,
) -> KernelCall:
    """Return the pass over the logits; its ``parts_ptr`` will hold the results.

    A program takes ``walk`` blocks of classes, or as many as make about so many programs.
    """
    rows, classes = len(problem.e), len(problem.c)
    row_blocks, class_blocks = triton.cdiv(rows, tile.rows), triton.cdiv(classes, tile.classes)
    walk = walk or triton.cdiv(class_blocks, triton.cdiv(programs, row_blocks))
    splits = triton.cdiv(class_blocks, walk)
    arguments = {
        "head": _head(problem),
        "scale": _scale(problem, softmax),
        "other": None if other is None else _head(other),
        "parts_ptr": problem.e.new_empty(8, splits, rows, dtype=torch.float32),
        "N": rows,
        "V": classes,
        "splits": splits,
        "EXPECTED": expected,
        "SUMS": sums,
        "PREDICTED": predicted,
    }
    return KernelCall(kernels.row_sums_kernel, row_blocks * splits, arguments | _options(problem, tile))


def slab_call(
    problem: LinearProblem,
    softmax: Softmax,
    parts: kernels.Parts,
    other: LinearProblem | None,
    slab: Tensor,
    first: int,
    tile: Tile,
) -> KernelCall:
    """Return the call that fills ``slab`` (N, B) with ∂L/∂z of the classes from ``first`` on."""
    rows, width = slab.shape
    arguments = {
        "head": _head(problem),
        "scale": _scale(problem, softmax),
        "parts": parts,
        "other": None if other is None else _head(other),
        "slab_ptr": slab,
        "N": rows,
        "first": first,
        "width": width,
        "pitch": slab.stride(0),
    }
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.classes)
    return KernelCall(kernels.slab_kernel, programs, arguments | _options(problem, tile))


def row_gradients_call(problem: LinearProblem, slab: Tensor, c: Tensor, de: Tensor, tile: Tile) -> KernelCall:
    """Return the call that adds a slab's (N, B) part, with its classes' rows (B, D), to ``de`` (N, D)."""
    rows, width = slab.shape
    c = c if c.stride(1) == 1 else c.contiguous()
    arguments = {
        "slab_ptr": slab,
        "c_ptr": c,
        "de_ptr": de,
        "N": rows,
        "width": width,
        "features": c.shape[1],
        "pitch": slab.stride(0),
        "c_stride": c.stride(0),
        "de_stride": de.stride(0),
    }
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(c.shape[1], tile.features)
    return KernelCall(kernels.row_gradients_kernel, programs, arguments | _options(problem, tile))


def fused_call(
    problem: LinearProblem,
    softmax: Softmax,
    parts: kernels.Parts,
    order: Tensor | None,
    sums: Gradients,
    masses: tuple[Tensor | None, Tensor | None],
    eps: float,
    tile: Tile,
) -> KernelCall:
    """Return the call that adds the gradients to ``sums`` and what it drops to ``masses``, (N,) and (V,).

    ``order`` has the order in which classes are walked, shape (V,), or is None.
    """
    rows, classes = len(problem.e), len(problem.c)
    arguments = {
        "head": _head(problem),
        "scale": _scale(problem, softmax),
        "parts": parts,
        "order_ptr": order,
        "de_ptr": sums.e,
        "dc_ptr": sums.c,
        "db_ptr": sums.bias,
        "row_mass_ptr": masses[0],
        "class_mass_ptr": masses[1],
        "eps": eps,
        "N": rows,
        "V": classes,
    }
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(classes, tile.classes)
    return KernelCall(kernels.fused_kernel, programs, arguments | _options(problem, tile))


def parts_of(coefficients: Coefficients, logsumexp: Tensor, expected: Tensor | None) -> kernels.Parts:
    """Return coefficients and row sums, all of shape (N,), as kernels see them."""
    return kernels.Parts(
        logsumexp=_vector(logsumexp),
        mean=_vector(expected),
        softmax=_vector(coefficients.softmax),
        expected=_vector(coefficients.expected),
        target=_vector(coefficients.target),
        constant=_vector(coefficients.constant),
        linear=_vector(coefficients.linear),
        weights=_vector(coefficients.constant_weights),
    )


def target_of(tensor: Tensor) -> CompileTarget:
    """Return the family of the device of a tensor, whatever its shape.

    Raises:
        UserError: No table fits the device.
    """
    if triton.knobs.runtime.interpret:
        return TARGETS["interpreter"]
    if tensor.device.type != "cuda":
        raise UserError(f"The Triton kernels need a GPU, and the tensors are on {tensor.device}")
    if torch.version.hip:
        name = torch.cuda.get_device_properties(tensor.device).gcnArchName.partition(":")[0]
        family = {"gfx942": "gfx942", "gfx950": "gfx942"}.get(name)
    else:
        major = torch.cuda.get_device_capability(tensor.device)[0]
        name, family = f"sm_{major}0", {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_80"}.get(major)
    if family is None:
        raise UserError(f"The Triton kernels have no block sizes for {name}; impl='cpu' runs on any device")
    return TARGETS[family]


def is_lean(problem: LinearProblem, softmax: Softmax, coefficients: Coefficients) -> bool:
    """Return whether this is plain cross-entropy, whose few numbers leave registers to a larger tile."""
    c = coefficients
    options = (problem.bias, problem.softcap, problem.target_offset, softmax.classes)
    parts = (c.expected, c.constant, c.linear)
    one = not isinstance(softmax.temperature, Tensor) and softmax.temperature == 1.0
    return one and all(extra is None for extra in options + parts)


def choose(
    kernel: Kernel,
    problem: LinearProblem,
    *,
    lean: bool = False,
    trial: Callable[[Tile], KernelCall] | None = None,
) -> Tile:
    """Return the table's first tile that suits, or the fastest if several do and ``trial`` may be called.

    The fastest is looked for once per kernel, device, dtype and binary magnitude of D, never while a CUDA
    graph is captured, and never where torch is told to be deterministic, since tiles differ in rounding.
    """
    table = target_of(problem.e).tiles[kernel, problem.e.element_size()]
    suitable = [tile for tile in table if lean or not tile.lean]
    if trial is None or len(suitable) == 1 or torch.are_deterministic_algorithms_enabled():
        return suitable[0]
    key = (kernel, lean, problem.e.device, problem.e.dtype, problem.e.shape[1].bit_length())
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return suitable[0]
        _fastest[key] = min(suitable, key=lambda tile: triton.testing.do_bench(trial(tile)))
    return _fastest[key]


def _options(problem: LinearProblem, tile: Tile) -> dict[str, Any]:
    tf32 = torch.get_float32_matmul_precision() == "high"
    return {
        "ROWS": tile.rows,
        "CLASSES": tile.classes,
        "FEATURES": tile.features,
        "PRECISION": "tf32" if tf32 and problem.e.dtype == torch.float32 else "ieee",
        # The interpreter multiplies bfloat16 as integers.
        "UPCAST": triton.knobs.runtime.interpret,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _head(problem: LinearProblem) -> kernels.HeadPointers:
    frozen, scale = problem.frozen or (None, None)
    e, c = (x if x.stride(1) == 1 else x.contiguous() for x in (problem.e, problem.c))
    fixed = frozen if frozen is None or frozen.stride(1) == 1 else frozen.contiguous()
    return kernels.HeadPointers(
        e=e,
        c=c,
        e_stride=e.stride(0),
        c_stride=c.stride(0),
        features=c.shape[1],
        frozen=fixed,
        frozen_stride=None if fixed is None else fixed.stride(0),
        frozen_features=None if fixed is None else fixed.shape[1],
        frozen_scale=_vector(scale),
        targets=problem.targets.contiguous(),
        bias=None if problem.bias is None else problem.bias.contiguous(),
        softcap=problem.softcap,
        offset=_vector(problem.target_offset),
    )


def _scale(problem: LinearProblem, softmax: Softmax) -> kernels.Scale:
    classes = None if softmax.classes is None else softmax.classes.to(torch.int8).contiguous()
    if isinstance(softmax.temperature, Tensor):
        return kernels.Scale(_vector(softmax.temperature), classes)
    if softmax.temperature == 1.0:
        return kernels.Scale(None, classes)
    rows = problem.e.new_full((len(problem.e),), softmax.temperature, dtype=torch.float32)
    return kernels.Scale(rows, classes)


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float().contiguous()
