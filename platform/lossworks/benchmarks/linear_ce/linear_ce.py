"""``lossworks bench linear-ce``: linear cross-entropies side by side, in multiples of one matrix product.

Every figure comes from a fresh process, in which the method and one plain product E·Cᵀ run in turns.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.linear_ce.compared_methods import COMPARED_METHODS, methods_for
from lossworks.benchmarks.linear_ce.linear_ce_chart import PLAIN, draw_linear_ce
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import Measurement, measured, run_worker
from lossworks.errors import RunError, UserError, require_one
from lossworks.specs import Spec

if TYPE_CHECKING:
    from lossworks.benchmarks.linear_ce.linear_ce_worker import HeadCase

_WORKER = "lossworks.benchmarks.linear_ce.linear_ce_worker"
_NO_UNITS = (
    "this CPU has no matrix units for the dtype: products are taken in float32, and times are ratios to "
    "those of plain torch (logits and cross_entropy), taken in turns"
)
_SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)")


class LinearCeSpec(Spec):
    """What ``lossworks bench linear-ce`` compares; lists may be written with commas."""

    shapes: Annotated[tuple[str, ...], COMMAS] = Field(
        ("2048x32768x512",),
        description="N x V x D: rows, classes, features; with 4096x128256x1024 and 1024x256000x2304, the "
        "heads of large models, it takes more than an hour",
    )
    distributions: Annotated[tuple[Literal["random", "peaked"], ...], COMMAS] = Field(
        ("peaked", "random"),
        description="peaked as a trained head, random as one at the start; methods that skip nothing by "
        "its probability run on the first one only",
    )
    dtypes: Annotated[tuple[Literal["fp32", "bf16"], ...], COMMAS] = Field(
        ("fp32", "bf16"), description="dtype of E, C and the gradients"
    )
    methods: Annotated[tuple[str, ...] | None, COMMAS] = Field(
        None, description=f"some of {', '.join(COMPARED_METHODS)}; unset, all that are made for the device"
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="where to run")
    threads: int = Field(2, ge=1, le=1024, description="threads of the CPU")
    seed: int = Field(0, ge=0, description="seed of the inputs")
    enough_s: float = Field(
        60.0, ge=0.0, description="seconds of timing after which three repeats of a method are enough"
    )
    limit_s: float = Field(3600.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("shapes")
    @classmethod
    def _are_shapes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for shape in value:
            parse_shape(shape)
        return value

    @field_validator("methods")
    @classmethod
    def _are_methods(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            require_one(name, list(COMPARED_METHODS), "method")
        return value


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return N, V and D of ``NxVxD``.

    Raises:
        ValueError: It is none.
    """
    if not _SHAPE.fullmatch(text):
        raise ValueError(f"{text!r} must be NxVxD, for instance 2048x32768x512")
    n, v, d = (int(size) for size in text.split("x"))
    return n, v, d


def run(overrides: Sequence[str], repeats: int, done: Sequence[BenchmarkRow] = ()) -> Iterator[BenchmarkRow]:
    """Measure every method on every shape, distribution and dtype; progress goes to standard error.

    Args:
        overrides: ``key=value``, fields of the spec.
        repeats: Times that every call is timed.
        done: Figures of an earlier run, which are given again instead of being measured.

    Yields:
        By case and method: seconds of the loss with both gradients, and of the loss alone, as multiples of
        the product's (of plain torch's where a CPU has no matrix units for the dtype); peak memory beyond the
        gradients, as a share of the fp32 logits' N·V·4 bytes; relative errors of the gradients against
        float64; the mean loss; the product's seconds. A method that can't run has one row that says why.

    Raises:
        UserError: An override is wrong, or there is no such device.
    """
    spec = LinearCeSpec().override(overrides)
    _require_device(spec.device)
    yield from measured(
        [
            Measurement(
                _title(case), COMPARED_METHODS[case.method].label, partial(_measured, case, spec.limit_s)
            )
            for case in _cases(spec, repeats)
        ],
        done,
    )


def _cases(spec: LinearCeSpec, repeats: int) -> "Iterator[HeadCase]":
    from lossworks.benchmarks.linear_ce.linear_ce_worker import HeadCase

    methods = methods_for(spec.device) if spec.methods is None else spec.methods
    first = spec.distributions[:1]
    for shape, dtype, distribution, method in product(spec.shapes, spec.dtypes, spec.distributions, methods):
        if distribution in first or COMPARED_METHODS[method].skips:
            n, v, d = parse_shape(shape)
            yield HeadCase(
                n,
                v,
                d,
                distribution,
                dtype,
                method,
                spec.device,
                spec.threads,
                spec.seed,
                repeats,
                spec.enough_s,
            )


def _require_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("device=cuda: torch finds no GPU here; use device=cpu")


def _title(case: "HeadCase") -> str:
    where = f"{case.threads} threads" if case.device == "cpu" else case.device
    return f"{case.n} x {case.v} x {case.d}, {case.dtype}, {case.distribution}, {where}"


def _measured(case: "HeadCase", limit_s: float) -> list[BenchmarkRow]:
    """Return the figures of one method on one case, or one row with the reason why there are none."""
    method = COMPARED_METHODS[case.method]
    try:
        reason = method.reason_against(case.device)
        result = {"skipped": reason} if reason else run_worker(_WORKER, asdict(case), case.threads, limit_s)
    except RunError as error:
        result = {"skipped": f"failed: {error}"}
    if "skipped" in result:
        return [BenchmarkRow(_title(case), method.label, "not measured", None, "", result["skipped"])]
    return _rows(case, result)


def _rows(case: "HeadCase", result: dict[str, Any]) -> list[BenchmarkRow]:
    from lossworks.benchmarks.linear_ce.gradient_errors import sampled_rows

    logits = 4 * case.n * case.v
    rows = sampled_rows(case.n, case.v, case.d)
    relative = "relative" if rows == case.n else f"first {rows} rows"
    resident = "% of logits" if result["peak"] != "ru_maxrss" else "% of logits, or more"
    both, forward, unit = result["product_s"], result["product_s"], "products"
    if result.get("plain_s"):
        (both, forward), unit = result["plain_s"], PLAIN
    figures = [
        ("forward+backward", result["forward_backward_s"] / both, unit),
        ("forward", result["forward_s"] / forward, unit),
        ("extra memory", 100 * result["extra_bytes"] / logits, resident),
        ("error dE", result["error_e"], relative),
        ("error dC", result["error_c"], relative),
        ("loss", result["loss"], "nats"),
        ("product", result["product_s"], "s"),
    ]
    label = COMPARED_METHODS[case.method].label
    found = [BenchmarkRow(_title(case), label, metric, value, unit) for metric, value, unit in figures]
    if result.get("plain_s") and case.method == "exact":
        found[0] = replace(found[0], note=_NO_UNITS)
    return found


LINEAR_CE = Benchmark(
    "linear cross-entropies: time in matrix products, memory, gradient errors",
    run,
    repeats=5,
    draw=draw_linear_ce,
    go_on=run,
)
