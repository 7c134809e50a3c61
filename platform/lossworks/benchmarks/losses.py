"""``lossworks bench losses``: what losses of the catalogue cost beside plain cross-entropy, without logits.

Every loss runs in a fresh process, in turns with linear cross-entropy on the same inputs; the factored head
of the spherical Z-loss takes whole steps at growing numbers of classes, in one process, in turns.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.linear_ce.linear_ce import parse_shape
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import run_worker
from lossworks.catalogue.registry import declarations
from lossworks.errors import RunError, require_one
from lossworks.specs import Spec


class LossesSpec(Spec):
    """What ``lossworks bench losses`` measures; lists may be written with commas."""

    shape: str = Field("2048x32768x512", description="N x V x D: rows, classes, features")
    losses: Annotated[tuple[str, ...] | None, COMMAS] = Field(
        None, description="slugs; unset, all that run without logits and need no further inputs"
    )
    classes: Annotated[tuple[int, ...], COMMAS] = Field(
        (10_000, 100_000, 1_000_000), description="numbers of classes of the spherical Z-loss's step"
    )
    step_rows: int = Field(128, ge=1, description="rows of such a step")
    step_features: int = Field(256, ge=2, description="features of such a step")
    threads: int = Field(2, ge=1, le=1024, description="threads of the CPU")
    seed: int = Field(0, ge=0, description="seed of the inputs")
    limit_s: float = Field(3600.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("losses")
    @classmethod
    def _are_losses(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            require_one(name, _measured_losses(), "loss without logits")
        return value

    @field_validator("shape")
    @classmethod
    def _is_shape(cls, value: str) -> str:
        parse_shape(value)
        return value


def _measured_losses() -> list[str]:
    return [slug for slug, entry in declarations().items() if entry.of_next_tokens]


def run(overrides: Sequence[str], repeats: int) -> Iterator[BenchmarkRow]:
    """Measure every loss; progress goes to standard error.

    Yields:
        For every loss: forward and backward as a multiple of linear cross-entropy's, the same in matrix
        products E·Cᵀ, and memory beyond the gradients in % of the logits. For every number of classes: the
        milliseconds of a step of the factored head, of one of plain descent on dense weights, and the former
        as a multiple of that at the fewest classes.
    """
    from rich.console import Console

    spec = LossesSpec().override(overrides)
    console = Console(stderr=True)
    for slug in spec.losses or _measured_losses():
        with console.status(slug):
            rows = _loss_rows(spec, slug, repeats)
        console.print(f"{slug}: {rows[0].note or f'{rows[0].value:.2f} {rows[0].unit}'}", highlight=False)
        yield from rows
    with console.status("steps of the spherical Z-loss"):
        rows = _step_rows(spec, repeats)
    yield from rows


def _loss_rows(spec: LossesSpec, slug: str, repeats: int) -> list[BenchmarkRow]:
    n, v, d = parse_shape(spec.shape)
    case = {"slug": slug, "n": n, "v": v, "d": d, "threads": spec.threads, "seed": spec.seed}
    title = f"{n} x {v} x {d}, fp32, peaked, {spec.threads} threads"
    try:
        found = run_worker(
            "lossworks.benchmarks.losses_worker", case | {"repeats": repeats}, spec.threads, spec.limit_s
        )
    except RunError as error:
        return [BenchmarkRow(title, slug, "not measured", None, "", f"failed: {error}")]
    return [
        BenchmarkRow(title, slug, "over cross-entropy", found["loss_s"] / found["cross_entropy_s"], "x"),
        BenchmarkRow(title, slug, "forward+backward", found["loss_s"] / found["product_s"], "products"),
        BenchmarkRow(title, slug, "extra memory", 100 * found["extra_bytes"] / (4 * n * v), "% of logits"),
    ]


def _step_rows(spec: LossesSpec, repeats: int) -> list[BenchmarkRow]:
    case = {"classes": list(spec.classes), "rows": spec.step_rows, "features": spec.step_features}
    case |= {"threads": spec.threads, "seed": spec.seed, "repeats": max(10, repeats)}
    title = f"spherical-z-loss, a step of {spec.step_rows} rows, {spec.step_features} features"
    try:
        found = run_worker("lossworks.benchmarks.losses_worker", case, spec.threads, spec.limit_s)
    except RunError as error:
        return [BenchmarkRow(title, "factored head", "not measured", None, "", f"failed: {error}")]
    first = found["factored_s"][0]
    rows = []
    for classes, factored, dense in zip(spec.classes, found["factored_s"], found["dense_s"], strict=True):
        method = f"{classes:,} classes"
        rows.append(BenchmarkRow(title, method, "factored step", 1000 * factored, "ms"))
        rows.append(BenchmarkRow(title, method, "over the fewest classes", factored / first, "x"))
        rows.append(BenchmarkRow(title, method, "dense step", 1000 * dense, "ms"))
    return rows


LOSSES_BENCHMARK = Benchmark(
    "losses of the catalogue beside plain cross-entropy, without logits", run, repeats=5
)
