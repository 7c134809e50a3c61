"""Block sizes: one small table, keyed on the target, in place of a search on the user's machine.

Every entry compiles for its target without a spilled register and fits its shared memory: ``lean`` ones for
plain cross-entropy, the others with all options on (``tests/platform/head/test_triton_ahead_of_time.py``).
Where both suit, the first is the default and a real GPU tries them once.
"""

from dataclasses import dataclass
from typing import Literal, get_args

Kernel = Literal["row_sums", "slab", "fused", "teacher", "row_gradients"]


@dataclass(frozen=True)
class Tile:
    """One way to cut rows × classes × features, and the launch options that go with it.

    Attributes:
        rows: Rows of a tile of logits.
        classes: Columns of it.
        features: How much of a row of E and C a step of a product takes.
        warps: Warps of a program.
        stages: Depth of the software pipeline of loads.
        lean: Only for plain cross-entropy, whose few options leave the registers to a larger tile.
    """

    rows: int
    classes: int
    features: int
    warps: int
    stages: int
    lean: bool = False


@dataclass(frozen=True)
class CompileTarget:
    """A family of GPUs.

    Attributes:
        name: What the compiler calls its first member.
        shared_bytes: Shared memory that a program may use on every member.
        tiles: By kernel and bytes of an input element.
        programs: Into how many programs a pass over the logits is split, if it can be: a few for each of 100
            to 300 processors. It does not follow the GPU at hand, or sums would differ between GPUs.
        slab_bytes: Size of the slab of ∂L/∂z. At 8192 rows of bfloat16 it is 16,384 classes wide, enough for
            products at full speed; ∂E is read and written once a slab.
        walk: Blocks of classes of a program, and of a slab, where sums must not follow the number of rows.
    """

    name: str
    shared_bytes: int
    tiles: dict[tuple[Kernel, int], tuple[Tile, ...]]
    programs: int = 1024
    slab_bytes: int = 256 * 2**20
    walk: int = 32


# Larger tiles read less: a pass reads E and C from the L2 cache V/classes and N/rows times. At 128 × 256 the
# accumulator takes half of the registers, so the options' numbers per row and class don't fit any more;
# Ampere has its matrix operands in registers, too. Two accumulators (teacher) and the tile of ∂L/∂z as an
# operand (fused) limit the others. A step of 64 features in bfloat16 is a cache line of 128 bytes.
_WIDE = Tile(128, 256, 64, warps=8, stages=3, lean=True)
_EVEN = Tile(128, 128, 64, warps=8, stages=3)
_EVEN_LEAN = Tile(128, 128, 64, warps=8, stages=3, lean=True)
_HALF = Tile(128, 64, 64, warps=8, stages=3)
# One stage less where shared memory is short: 99 KiB on sm_86, sm_89 and sm_120, 64 KiB on gfx942.
_WIDE_SHORT = Tile(128, 256, 64, warps=8, stages=2, lean=True)
_EVEN_SHORT = Tile(128, 128, 64, warps=8, stages=2)
_HALF_SHORT = Tile(128, 64, 64, warps=8, stages=2)
_NARROW = Tile(128, 64, 32, warps=8, stages=2)

_Table = dict[tuple[Kernel, int], tuple[Tile, ...]]

# Exact float32 products run on the plain arithmetic units, each thread holding its operands in registers. The
# fused kernel spills kilobytes then, and its filter drops next to nothing at float32's ε, so there is none.
_FLOAT32: _Table = {
    ("row_sums", 4): (Tile(64, 64, 32, warps=4, stages=2),),
    ("slab", 4): (Tile(64, 64, 32, warps=4, stages=2),),
    ("teacher", 4): (Tile(64, 64, 32, warps=8, stages=2),),
    ("row_gradients", 4): (Tile(64, 32, 64, warps=4, stages=2),),
}
_HOPPER: _Table = _FLOAT32 | {
    ("row_sums", 2): (_WIDE, _EVEN),
    ("slab", 2): (_WIDE, _HALF),
    ("fused", 2): (_HALF,),
    ("teacher", 2): (_HALF,),
    ("row_gradients", 2): (_EVEN,),
}
_BLACKWELL: _Table = _HOPPER | {("row_sums", 2): (_WIDE, _HALF)}
_AMPERE: _Table = _HOPPER | {
    ("row_sums", 2): (_EVEN_LEAN, _HALF),
    ("slab", 2): (_EVEN_LEAN, _HALF),
    ("fused", 2): (_HALF_SHORT,),
    ("row_gradients", 2): (_EVEN_SHORT,),
    ("teacher", 4): (Tile(64, 32, 32, warps=4, stages=2),),
}
_CDNA3: _Table = _FLOAT32 | {
    ("row_sums", 2): (_WIDE_SHORT, _EVEN_SHORT),
    ("slab", 2): (_WIDE_SHORT, _EVEN_SHORT),
    ("fused", 2): (_NARROW,),
    ("teacher", 2): (_HALF_SHORT,),
    ("row_gradients", 2): (_HALF_SHORT,),
}
# Small, so that tests with several tiles along every axis are small.
_TINY = (Tile(16, 32, 16, warps=1, stages=1),)
_INTERPRETED: _Table = {(k, w): _TINY for k in get_args(Kernel) for w in (2, 4)}

TARGETS = {
    target.name: target
    for target in (
        CompileTarget("sm_80", 101_376, _AMPERE),
        CompileTarget("sm_90", 232_448, _HOPPER),
        CompileTarget("sm_100", 232_448, _BLACKWELL),
        CompileTarget("gfx942", 65_536, _CDNA3),
        CompileTarget("interpreter", 0, _INTERPRETED, programs=4, slab_bytes=4096, walk=1),
    )
}
