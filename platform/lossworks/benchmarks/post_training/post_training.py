"""``lossworks bench post-training``: losses of fine-tuning, preferences and distillation on a large head.

Every figure comes from a fresh process, in which the loss and one plain linear cross-entropy run in turns.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import Measurement, measured, run_worker
from lossworks.errors import RunError
from lossworks.specs import Spec

if TYPE_CHECKING:
    from lossworks.benchmarks.post_training.post_training_worker import PostTrainingCase

_WORKER = "lossworks.benchmarks.post_training.post_training_worker"
_ANSWER = 64


class PostTrainingSpec(Spec):
    """What ``lossworks bench post-training`` compares; lists may be written with commas."""

    classes: Annotated[tuple[int, ...], COMMAS] = Field(
        (32768, 128256), description="V, sizes of the vocabulary"
    )
    rows: int = Field(2048, ge=64, description="N, tokens of a step; of preferences N chosen and N rejected")
    width: int = Field(512, ge=1, description="D, features of model and teacher")
    jobs: Annotated[tuple[Literal["sft", "dpo", "distillation"], ...], COMMAS] = Field(
        ("sft", "dpo", "distillation"),
        description="sft: cross-entropy; dpo: −log σ(β·margin) with a reference's log-probabilities given; "
        "distillation: KL from a teacher's head",
    )
    methods: Annotated[tuple[Literal["ours", "statistics", "dense", "liger-kernel"], ...], COMMAS] = Field(
        ("ours", "statistics", "dense", "liger-kernel"),
        description="ours; statistics: ours without folding the gradient in; dense: torch with the logits",
    )
    threads: int = Field(2, ge=1, le=1024, description="threads of the CPU")
    seed: int = Field(0, ge=0, description="seed of the inputs")
    enough_s: float = Field(
        30.0, ge=0.0, description="seconds of timing after which three repeats of a method are enough"
    )
    limit_s: float = Field(1800.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("rows")
    @classmethod
    def _are_answers(cls, value: int) -> int:
        if value % _ANSWER:
            raise ValueError(f"must be a multiple of {_ANSWER}, the tokens of an answer")
        return value


def run(overrides: Sequence[str], repeats: int, done: Sequence[BenchmarkRow] = ()) -> Iterator[BenchmarkRow]:
    """Measure every job in every way; progress goes to standard error.

    Args:
        overrides: ``key=value``, fields of the spec.
        repeats: Times that every call is timed.
        done: Figures of an earlier run, which are given again instead of being measured.

    Yields:
        By case and method: seconds of loss and gradients as a multiple of plain linear cross-entropy's of N
        rows; peak memory beyond inputs and gradients, in MiB and as a share of the logits' of one head,
        N·V·4 bytes; the value. A method that can't run has one row that says why.

    Raises:
        UserError: An override is wrong.
    """
    from lossworks.benchmarks.post_training.trained_losses import POST_TRAINING_METHODS

    spec = PostTrainingSpec().override(overrides)
    cases = [case for case in _cases(spec, repeats) if case.job in POST_TRAINING_METHODS[case.method].losses]
    labels = [POST_TRAINING_METHODS[case.method].label for case in cases]
    yield from measured(
        [
            Measurement(_title(case), label, partial(_measured, case, label, spec.limit_s))
            for case, label in zip(cases, labels, strict=True)
        ],
        done,
    )


def _cases(spec: PostTrainingSpec, repeats: int) -> "Iterator[PostTrainingCase]":
    from lossworks.benchmarks.post_training.post_training_worker import PostTrainingCase

    for classes, job, method in product(spec.classes, spec.jobs, spec.methods):
        yield PostTrainingCase(
            *(job, method, spec.rows, classes, spec.width, spec.threads, spec.seed, repeats, spec.enough_s)
        )


def _title(case: "PostTrainingCase") -> str:
    rows = f"2 x {case.n}" if case.job == "dpo" else str(case.n)
    return f"{case.job}, {rows} x {case.v} x {case.d}, fp32, {case.threads} threads"


def _measured(case: "PostTrainingCase", label: str, limit_s: float) -> list[BenchmarkRow]:
    """Return the figures of one way, or one row with the reason why there are none."""
    from lossworks.benchmarks.post_training.trained_losses import POST_TRAINING_METHODS

    reason = POST_TRAINING_METHODS[case.method].reason_against(case.job)
    try:
        found: dict[str, Any] = {} if reason else run_worker(_WORKER, asdict(case), case.threads, limit_s)
    except RunError as error:
        reason = f"failed: {error}"
    title = _title(case)
    if reason:
        return [BenchmarkRow(title, label, "not measured", None, "", reason)]
    logits = 4 * case.n * case.v * (2 if case.job == "dpo" else 1)
    return [
        BenchmarkRow(title, label, "loss+gradients", found["seconds"] / found["plain_s"], "x plain CE"),
        BenchmarkRow(title, label, "extra memory", found["extra_bytes"] / 2**20, "MiB"),
        BenchmarkRow(title, label, "extra memory", 100 * found["extra_bytes"] / logits, "% of logits"),
        BenchmarkRow(title, label, "loss", found["loss"], "nats"),
        BenchmarkRow(title, label, "plain CE", found["plain_s"], "s"),
    ]


POST_TRAINING = Benchmark(
    "losses of fine-tuning, preferences and distillation: time in linear cross-entropies, and memory",
    run,
    repeats=5,
    go_on=run,
)
