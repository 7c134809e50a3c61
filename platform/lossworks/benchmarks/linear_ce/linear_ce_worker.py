"""One measurement of ``lossworks bench linear-ce`` in a process of its own.

``python -m lossworks.benchmarks.linear_ce.linear_ce_worker '{"n": 2048, ...}'`` takes a ``HeadCase`` as
JSON and prints the figures as JSON on its last line. A fresh process has no caches of other methods and a
peak of its own.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lossworks.benchmarks.linear_ce.compared_methods import COMPARED_METHODS
from lossworks.benchmarks.linear_ce.gradient_errors import gradient_errors
from lossworks.benchmarks.linear_ce.head_inputs import DTYPES, make_inputs
from lossworks.benchmarks.worker import median_seconds, peak_growth
from lossworks.head.cpu.tiles import product_dtype

_WARM_UP_ROWS = (32, 48)


@dataclass(frozen=True)
class HeadCase:
    """What one process measures; shapes as in ``lossworks.linear_cross_entropy``.

    ``repeats`` is how often each call is timed, or three times where that has taken ``enough_s`` seconds.
    """

    n: int
    v: int
    d: int
    distribution: str
    dtype: str
    method: str
    device: str
    threads: int
    seed: int
    repeats: int
    enough_s: float = math.inf


@dataclass(frozen=True)
class Figures:
    """What one process has measured.

    Attributes:
        forward_backward_s: Median seconds of the loss and both gradients.
        forward_s: Median seconds of the loss under ``no_grad``.
        product_s: Median seconds of E·Cᵀ with a fresh result, in the inputs' dtype.
        plain_s: Median seconds of plain torch's loss with gradients, and without, in the same turns, where a
            product is no measure; else None.
        extra_bytes: Growth of the peak during loss and gradients, less the size of the gradients; with what
            the matrix library keeps for itself from its first large product on, some MiB.
        peak: How the peak was read.
        loss: The mean loss, nats.
        error_e: Relative error of ∂E.
        error_c: Relative error of ∂C.
    """

    forward_backward_s: float
    forward_s: float
    product_s: float
    plain_s: tuple[float, float] | None
    extra_bytes: int
    peak: str
    loss: float
    error_e: float
    error_c: float


def in_full_precision_only(case: HeadCase) -> bool:
    """Return whether ours take the products of a narrow dtype in float32, as it is the fastest way here.

    One product of torch's in that dtype is then no measure: it has no matrix units, either, and is slow.
    """
    dtype = DTYPES[case.dtype]
    return case.device == "cpu" and dtype.itemsize < 4 and product_dtype(dtype, "cpu") == torch.float32


def reason_too_large(case: HeadCase, free_bytes: int) -> str | None:
    """Return why ``case`` will not fit into the free memory of its device, or None if it will.

    Counted are the inputs as drawn in fp32, E and C with gradients and an fp32 accumulator, and the larger of
    the method's buffers and the product.
    """
    size = DTYPES[case.dtype].itemsize
    copies = COMPARED_METHODS["dense" if in_full_precision_only(case) else case.method].copies
    factors = (case.n + case.v) * case.d * (4 + 2 * size + 4)
    need = factors + case.n * case.v * max(4 * copies, size)
    if need <= free_bytes:
        return None
    return f"needs about {need / 2**30:.1f} GiB of memory and {free_bytes / 2**30:.1f} GiB are free"


def measure(case: HeadCase) -> Figures:
    """Return the figures of a case; memory comes first, before freed blocks could hide growth."""
    e, c, y = make_inputs(case.n, case.v, case.d, case.distribution, case.dtype, case.device, case.seed)
    loss = COMPARED_METHODS[case.method].build()

    def forward_backward() -> tuple[Tensor, ...]:
        value = loss(e, c, y)
        return value.detach(), *torch.autograd.grad(value, (e, c))

    _warm_up(loss, e, c, y)
    growth, peak, value = peak_growth(forward_backward, case.device)
    error_e, error_c = gradient_errors(loss, e, c, y)
    calls: list[Callable[[], object]] = [
        forward_backward,
        torch.no_grad()(lambda: loss(e, c, y)),
        torch.no_grad()(lambda: e @ c.t()),
    ]
    plain = None
    if in_full_precision_only(case):
        dense = COMPARED_METHODS["dense"].build()
        calls += [
            lambda: torch.autograd.grad(dense(e, c, y), (e, c)),
            torch.no_grad()(lambda: dense(e, c, y)),
        ]
    both, forward, product, *others = median_seconds(calls, case.repeats, case.device, case.enough_s)
    if others:
        plain = others[0], others[1]
    return Figures(
        forward_backward_s=both,
        forward_s=forward,
        product_s=product,
        plain_s=plain,
        extra_bytes=max(0, growth - (e.numel() + c.numel()) * e.element_size()),
        peak=peak,
        loss=value,
        error_e=error_e,
        error_c=error_c,
    )


def _warm_up(loss: Callable[[Tensor, Tensor, Tensor], Tensor], e: Tensor, c: Tensor, y: Tensor) -> None:
    """Call the method on few rows, so that buffers made to measure appear later, where memory is watched.

    Two counts of rows, so that a compiler makes a kernel for any count now and not then.
    """
    for rows in _WARM_UP_ROWS:
        small = e[:rows].detach().clone().requires_grad_()
        torch.autograd.grad(loss(small, c, y[:rows].clone()), (small, c))


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def main() -> None:
    """Measure the case in the first argument, or say why it was skipped."""
    case = HeadCase(**json.loads(sys.argv[1]))
    torch.set_num_threads(case.threads)
    reason = reason_too_large(case, _free_bytes(case.device))
    result = {"skipped": reason} if reason else dataclasses.asdict(measure(case))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
