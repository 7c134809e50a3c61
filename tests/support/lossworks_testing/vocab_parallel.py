"""What each rank of a vocabulary-parallel head is asked in tests; in a module that new processes can import.

A launch of processes takes seconds, so one runs all cases and says by name which of them are wrong.
"""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from lossworks.errors import UserError
from lossworks.head import (
    Divergence,
    Gathered,
    LowRankClassifier,
    TeacherExpectedLogit,
    VocabParallel,
    linear_cross_entropy,
    linear_log_probabilities,
    linear_row_statistics,
)
from lossworks.head.core.divergences import DivergenceKind
from lossworks.head.cpu import backend as cpu
from lossworks.head.cpu.tile_sizes import TileSizes

IGNORE = -100
ROWS, FEATURES = 11, 5
SIZES = {2: [(5, 6), (10, 1)], 3: [(4, 4, 3), (1, 9, 2)]}
"""Classes of each rank; consecutive, in the order of the ranks."""


@dataclass(frozen=True)
class Case:
    """One call of the head.

    Attributes:
        options: Its keyword arguments.
        bias: Whether there is one.
        targets: Where they lie: ``anywhere`` (some ignored), ``first``, ``last`` (rank's classes) or
            ``ignored``.
        tiles: ``default``, ``kept`` or ``twice`` in tiles of three rows and two classes.
        dtype: Of the tensors.
        reduce_e: As in VocabParallel.
    """

    options: dict[str, Any] = field(default_factory=dict)
    bias: bool = True
    targets: str = "anywhere"
    tiles: str = "default"
    dtype: torch.dtype = torch.float64
    reduce_e: bool = True


CASES = {
    "mean": Case(),
    "no bias": Case(bias=False),
    "sum": Case({"reduction": "sum"}),
    "none": Case({"reduction": "none"}),
    "lse": Case({"reduction": "sum", "return_lse": True}),
    "predicted": Case({"return_predicted": True}),
    "softcap": Case({"softcap": 2.0}),
    "smoothing": Case({"label_smoothing": 0.3}),
    "z-loss": Case({"z_loss": 0.1, "reduction": "sum"}),
    "temperature": Case({"temperature": 0.7}),
    "token weights": Case({"token_weight": torch.linspace(0, 2, ROWS, dtype=torch.float64)}),
    "targets of the first rank": Case({"reduction": "sum"}, targets="first"),
    "targets of the last rank": Case({"reduction": "none"}, targets="last"),
    "all rows ignored": Case({"reduction": "sum"}, targets="ignored"),
    "partial ∂E": Case(reduce_e=False),
    "partial ∂E, rows": Case({"reduction": "none"}, reduce_e=False),
    "without a buffer": Case({"buffer_share": 1e-6}),
    "float32": Case({"z_loss": 0.1}, dtype=torch.float32),
    "bfloat16": Case(dtype=torch.bfloat16),
    **{
        f"everything, {tiles}, {reduction}": Case(
            {
                "softcap": 2.0,
                "label_smoothing": 0.2,
                "z_loss": 0.1,
                "temperature": 1.3,
                "reduction": reduction,
                "return_lse": reduction == "none",
            },
            tiles=tiles,
        )
        for tiles in ("kept", "twice")
        for reduction in ("mean", "none")
    },
    "kept": Case(tiles="kept"),
    "twice": Case({"reduction": "sum"}, tiles="twice"),
}
STATISTICS = ("target", "logsumexp", "mean", "sum-of-squares", "variance", "expected")
TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 1e-6), torch.bfloat16: (3e-2, 3e-2)}


def failures() -> list[str]:
    """Return which of the cases are wrong on this rank, and how."""
    found = []
    for sizes in SIZES[dist.get_world_size()]:
        for name, case in CASES.items():
            with _reported(f"{name} {sizes}", found), _tiles(case.tiles):
                _check(case, sizes)
        with _reported(f"filter {sizes}", found):
            _check_filter(sizes)
        for reduce_e in (True, False):
            with _reported(f"statistics {sizes}, reduce_e={reduce_e}", found):
                _check_statistics(sizes, reduce_e=reduce_e)
        with _reported(f"low rank {sizes}", found):
            _check_low_rank(sizes)
    with _reported("DTensor", found):
        _check_distributed()
    for name, (message, change) in REFUSED.items():
        with _reported(name, found):
            _check_refused(message, change)
    return found


def _problem(case: Case, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return E, C, targets and bias, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    classes = sum(sizes)
    e = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64) * 2
    c = torch.randn(classes, FEATURES, generator=generator, dtype=torch.float64)
    bias = torch.randn(classes, generator=generator, dtype=torch.float64)
    low, high = {"first": (0, sizes[0]), "last": (classes - sizes[-1], classes)}.get(
        case.targets, (0, classes)
    )
    targets = torch.randint(low, high, (ROWS,), generator=generator)
    targets[[1, 6]] = IGNORE
    if case.targets == "ignored":
        targets[:] = IGNORE
    e, c, bias = (tensor.to(case.dtype).requires_grad_() for tensor in (e, c, bias))
    return e, c, targets, bias if case.bias else None


def _check(case: Case, sizes: tuple[int, ...]) -> None:
    e, c, targets, bias = _problem(case, sizes)
    parallel = VocabParallel(dist.group.WORLD, reduce_e=case.reduce_e)
    own_c, own_bias = _own(c, sizes), None if bias is None else _own(bias, sizes)
    results = linear_cross_entropy(e, own_c, targets, own_bias, vocab_parallel=parallel, **case.options)
    leaves = [x for x in (e, own_c, own_bias) if x is not None]
    gradients = list(torch.autograd.grad(_weighted(results), leaves))
    if not case.reduce_e:
        dist.all_reduce(gradients[0])
    expected, (of_e, *others) = _truth(case, sizes)
    tolerance = dict(zip(("rtol", "atol"), TOLERANCES[case.dtype], strict=True))
    for result, value in zip(_tuple(results), expected, strict=True):
        torch.testing.assert_close(result.double(), value.double(), **tolerance)
    for gradient, value in zip(gradients, [of_e, *(_own(x, sizes) for x in others)], strict=True):
        torch.testing.assert_close(gradient.double(), value, **tolerance)


def _truth(case: Case, sizes: tuple[int, ...]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Return results and gradients of one process that builds the logits in float64."""
    e, c, targets, bias = _problem(case, sizes)
    leaves = [x.detach().double().requires_grad_() for x in (e, c, bias) if x is not None]
    whole = leaves[2] if case.bias else None
    options = case.options | {"impl": "reference"}
    results = linear_cross_entropy(leaves[0], leaves[1], targets, whole, **options)
    return _tuple(results), list(torch.autograd.grad(_weighted(results), leaves))


def _check_filter(sizes: tuple[int, ...]) -> None:
    """The loss is exact; each gradient is off by no more than what the mass left out can do."""
    exact, (of_e, of_c, of_bias) = _truth(Case({"reduction": "sum"}), sizes)
    e, c, targets, bias = _problem(Case(), sizes)
    own_c, own_bias = _own(c, sizes), _own(bias, sizes)
    with _tiles("kept"):
        loss, mass = linear_cross_entropy(
            e,
            own_c,
            targets,
            own_bias,
            reduction="sum",
            filter_eps=0.1,
            return_mass=True,
            vocab_parallel=dist.group.WORLD,
        )
        found = torch.autograd.grad(_weighted(loss), (e, own_c, own_bias))
    dist.all_reduce(mass)
    slack = mass * _weighted(torch.ones(())).abs()
    torch.testing.assert_close(loss, exact[0], rtol=1e-10, atol=1e-12)
    spread = torch.cdist(c, c).max()
    if not mass.sum() > 0 or torch.equal(found[0], of_e):
        raise AssertionError("nothing was left out")
    if not bool(((found[0] - of_e).norm(dim=1) <= slack * spread + 1e-12).all()):
        raise AssertionError("∂E is off by more than the mass left out allows")
    far = torch.cdist(e, e).max() * slack.sum()
    if not float((found[1] - _own(of_c, sizes)).norm(dim=1).max()) <= far:
        raise AssertionError("∂C is off by more than the mass left out allows")
    if not float((found[2] - _own(of_bias, sizes)).abs().max()) <= 1e-9:
        raise AssertionError("the repair keeps the sum over rows, which is the bias's gradient")


def _check_statistics(sizes: tuple[int, ...], *, reduce_e: bool) -> None:
    """All statistics and log-probabilities, a teacher's whose classes are spread alike among them."""
    teacher_e, teacher_c = _problem(Case(), (sum(sizes),))[:2]
    teacher_c, rows = 1.0 - teacher_c.detach(), teacher_e.detach().flip(0)
    candidates = torch.arange(3 * ROWS).reshape(ROWS, 3) % sum(sizes)

    def of(
        e: Tensor, c: Tensor, targets: Tensor, bias: Tensor, theirs: Tensor, **how: Any
    ) -> tuple[Tensor, ...]:
        asked = [*STATISTICS, Gathered(candidates), TeacherExpectedLogit(rows, theirs, temperature=2.0)]
        asked += [Divergence(kind, rows, theirs, temperature=2.0) for kind in get_args(DivergenceKind)]
        found = linear_row_statistics(e, c, targets, bias, statistics=asked, softcap=4.0, **how)
        some = candidates.masked_fill(candidates % 4 == 0, IGNORE)
        return *found, linear_log_probabilities(e, c, some, bias, temperature=0.7, **how)

    e, c, targets, bias = _problem(Case(), sizes)
    parallel = VocabParallel(dist.group.WORLD, reduce_e=reduce_e)
    leaves = [e, _own(c, sizes), _own(bias, sizes)]
    found = of(e, leaves[1], targets, leaves[2], _own(teacher_c, sizes), vocab_parallel=parallel)
    gradients = list(torch.autograd.grad(_weighted(found), leaves))
    if not reduce_e:
        dist.all_reduce(gradients[0])
    expected = of(e, c, targets, bias, teacher_c, impl="reference")
    of_e, *others = torch.autograd.grad(_weighted(expected), (e, c, bias))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = [of_e, *(_own(x, sizes) for x in others)]
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-9)


def _check_low_rank(sizes: tuple[int, ...]) -> None:
    """C and B spread over the ranks, A whole on each."""
    e, c, targets, bias = _problem(Case(), sizes)
    a, b = c.detach()[:2].clone().requires_grad_(), c.detach()[:, :2].clone().requires_grad_()

    def of(c: Tensor, b: Tensor, bias: Tensor | None, **how: Any) -> tuple[Tensor, ...]:
        low = LowRankClassifier(c, a, b, 0.5)
        asked = [*STATISTICS, Gathered(torch.arange(ROWS)[:, None] % sum(sizes))]
        found = linear_row_statistics(e, low, targets, bias, statistics=asked, **how)
        return linear_cross_entropy(e, low, targets, bias, **how), *found

    c = c.detach()
    leaves = [e, a, _own(b, sizes), _own(bias, sizes)]
    found = of(_own(c, sizes), leaves[2], leaves[3], vocab_parallel=dist.group.WORLD)
    gradients = list(torch.autograd.grad(_weighted(found), leaves))
    expected = of(c, b, bias)
    of_e, of_a, *others = torch.autograd.grad(_weighted(expected), (e, a, b, bias))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    wanted = [of_e, of_a, *(_own(x, sizes) for x in others)]
    torch.testing.assert_close(gradients, wanted, rtol=1e-9, atol=1e-9)


def _check_distributed() -> None:
    """A DTensor placed by classes needs no option, and gets its gradient in the same placement."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = SIZES[dist.get_world_size()][0]
    e, c, targets, bias = _problem(Case(), sizes)
    split = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (c, bias)]
    loss = linear_cross_entropy(e, split[0], targets, split[1])
    gradients = torch.autograd.grad(_weighted(loss), (e, *split))
    expected, wanted = _truth(Case(), sizes)
    torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=1e-12)
    for gradient, value in zip(gradients, wanted, strict=True):
        if value is not wanted[0]:
            if not isinstance(gradient, DTensor) or tuple(gradient.placements) != (Shard(0),):
                raise AssertionError(f"the gradient is {type(gradient)}, not a DTensor placed by classes")
            gradient = gradient.full_tensor()  # noqa: PLW2901
        torch.testing.assert_close(gradient, value, rtol=1e-10, atol=1e-12)


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSED: dict[str, tuple[str, Change]] = {
    "a target beyond all classes": (
        "a class is in [0, 11)",
        lambda call: {"targets": call["targets"].index_fill(0, torch.tensor([3]), 11)},
    ),
    "a negative target": (
        "targets hold -1, first in row 3",
        lambda call: {"targets": call["targets"].index_fill(0, torch.tensor([3]), -1)},
    ),
    "class weights": ("class_weight", lambda call: {"class_weight": torch.ones(len(call["c"]))}),
    "soft targets": ("soft targets", lambda call: {"targets": torch.rand(ROWS, len(call["c"]))}),
    "the dense reference": ("impl", lambda _: {"impl": "reference"}),
    "NaN in the last rank's classes": (
        "holds NaN",
        lambda call: {"c": call["c"] + _on_the_last_rank(float("nan"), 0.0), "check": True},
    ),
    "no class on the last rank": (
        "has no class on rank",
        lambda call: {"c": call["c"][: _on_the_last_rank(0, len(call["c"]))]},
    ),
}


def _on_the_last_rank(there: Any, elsewhere: Any) -> Any:
    return there if dist.get_rank() == dist.get_world_size() - 1 else elsewhere


def _check_refused(message: str, change: Change) -> None:
    """Every rank is told, and none waits for another."""
    # 11 classes at two ranks and at three.
    sizes = SIZES[dist.get_world_size()][0]
    e, c, targets, _ = _problem(Case(), sizes)
    call = {"e": e, "c": _own(c, sizes), "targets": targets, "vocab_parallel": dist.group.WORLD}
    try:
        linear_cross_entropy(**call | change(call))
    except UserError as error:
        if message not in str(error):
            raise AssertionError(f"says {error}") from error
    else:
        raise AssertionError("was not refused")


def _own(tensor: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return this rank's classes as a leaf of their own."""
    part = tensor.detach().split(sizes)[dist.get_rank()].clone()
    return part.requires_grad_(tensor.requires_grad)


def _weighted(results: Any) -> Tensor:
    """Return one number of all results, by weights that every entry has for itself."""
    generator = torch.Generator().manual_seed(1)
    parts = [
        (result * torch.randn(result.shape, generator=generator, dtype=torch.float64)).sum()
        for result in _tuple(results)
    ]
    return torch.stack(parts).sum() * math.pi


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


@contextlib.contextmanager
def _tiles(kind: str) -> Iterator[None]:
    """Make tiles so small that these problems have several, and ragged last ones."""
    plain = cpu.choose_tile_sizes
    if kind != "default":
        cpu.choose_tile_sizes = lambda *_, keep, filtered: TileSizes(3, 2, keep and kind == "kept")
    try:
        yield
    finally:
        cpu.choose_tile_sizes = plain


@contextlib.contextmanager
def _reported(name: str, found: list[str]) -> Iterator[None]:
    try:
        yield
    except Exception:  # noqa: BLE001  (named with the other failures)
        found.append(f"{name}: {traceback.format_exc()}")
