"""``lossworks bench filtering``: what leaving small probabilities out of the gradient does to training.

Two parts. *states* compares gradients on held-out hidden states of a small language model with float64, at
several steps of its training. *training* trains the same model from scratch with each filter and the same
seeds, and compares the held-out losses. docs/filtering.md shows one run of both.
"""

import re
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.filtering.filtering_chart import draw_filtering
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.errors import UserError
from lossworks.specs import DataSpec, ModelSpec, OptimizerSpec, ScheduleSpec, Spec

if TYPE_CHECKING:
    from lossworks.benchmarks.filtering.filtering_study import Losses, Study

_RUN = re.compile(r"(exact|bf16)|(published|tiles-repaired|columns|columns-repaired)@(\d{1,2})")
_EXACT, _BF16 = "exact", "exact in bf16"
FILTERS = {
    "published": "published",
    "tiles-repaired": "published, repaired",
    "columns": "columns",
    "columns-repaired": "columns, repaired",
}


class FilteringMethod(NamedTuple):
    """A way to the gradient.

    Attributes:
        name: ``exact``, ``bf16``, or a key of ``FILTERS``.
        exponent: k of the threshold 2^-k; None without a filter.
    """

    name: str
    exponent: int | None

    @classmethod
    def parse(cls, text: str) -> "FilteringMethod":
        """Return the method that ``NAME`` or ``NAME@K`` stands for.

        Raises:
            ValueError: It stands for none.
        """
        match = _RUN.fullmatch(text)
        if match is None:
            filters = ", ".join(f"{name}@K" for name in FILTERS)
            raise ValueError(f"{text!r} must be exact, bf16, or one of {filters}, for a threshold of 2^-K")
        return cls(match[1] or match[2], int(match[3]) if match[3] else None)

    @property
    def eps(self) -> float | None:
        """The probability below which entries are left out; None where nothing is."""
        return None if self.exponent is None else 2.0**-self.exponent

    @property
    def label(self) -> str:
        """The name of the method in tables."""
        if self.exponent is None:
            return {"exact": _EXACT, "bf16": _BF16}[self.name]
        return f"{FILTERS[self.name]}, 2^-{self.exponent}"


class FilteringSpec(Spec):
    """What ``lossworks bench filtering`` compares; lists may be written with commas."""

    part: Literal["states", "training", "both"] = Field("both", description="what to measure")
    data: DataSpec = DataSpec(
        max_bytes=12 * 2**20, tokenizer_bytes=4 * 2**20, vocab_size=8192, sequence_length=64
    )
    model: ModelSpec = ModelSpec(layers=2, width=128, heads=4)
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec(warmup_steps=20, final_fraction=0.1)
    batch_size: int = Field(16, ge=1, description="sequences a step")
    steps: int = Field(300, ge=1, description="steps of each run that is trained with a filter")
    runs: Annotated[tuple[str, ...], COMMAS] = Field(
        ("exact", "bf16", "published@12", "tiles-repaired@12", "columns@12", "columns-repaired@12"),
        description="what to train with; @12 is a threshold of 2^-12, exact must be among them",
    )
    held_out_sequences: int = Field(1024, ge=1, description="held-out sequences that a run is judged by")
    frequent_share: float = Field(
        0.9, gt=0.0, lt=1.0, description="share of the training tokens that the frequent classes cover"
    )
    states_steps: Annotated[tuple[int, ...], COMMAS] = Field(
        (0, 30, 100, 300, 1000), description="steps of the exact run whose hidden states are looked at"
    )
    states_sequences: int = Field(32, ge=1, description="held-out sequences whose hidden states are taken")
    exponents: Annotated[tuple[int, ...], COMMAS] = Field(
        (10, 12, 14), description="thresholds 2^-k that the hidden states are filtered with"
    )
    threads: int = Field(1, ge=1, le=1024, description="threads of the CPU")

    @field_validator("runs")
    @classmethod
    def _are_runs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            FilteringMethod.parse(text)
        if "exact" not in value:
            raise ValueError("must have exact among them, since the others are compared with it")
        return value

    @field_validator("states_steps")
    @classmethod
    def _are_steps(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or min(value) < 0:
            raise ValueError("must be steps of at least 0")
        return value


def run(overrides: Sequence[str], repeats: int) -> list[BenchmarkRow]:
    """Measure gradients on hidden states, and train with each filter; progress goes to standard error.

    Args:
        overrides: Of :class:`FilteringSpec`.
        repeats: Seeds 0, 1, … that each run is trained with.

    Raises:
        UserError: An override is wrong, or there are too few seeds for a standard error.
    """
    spec = default_spec().override(overrides)
    if spec.part != "states" and repeats < 2:
        raise UserError(f"--repeats {repeats}: is the number of seeds, and a standard error needs two")
    from lossworks.benchmarks.filtering.filtering_study import Study

    study = Study(spec)
    rows: list[BenchmarkRow] = []
    if spec.part != "training":
        rows += _states(study)
    if spec.part != "states":
        rows += _training(study, repeats)
    return rows


def default_spec() -> FilteringSpec:
    """Return the spec with its groups set, so that an override of a group's field keeps the others."""
    spec = FilteringSpec()
    return FilteringSpec.model_validate(
        {name: getattr(spec, name) for name in ("data", "model", "optimizer", "schedule")}
    )


def _states(study: "Study") -> list[BenchmarkRow]:
    names = [f"{name}@{exponent}" for exponent in study.spec.exponents for name in FILTERS]
    methods = [FilteringMethod.parse(name) for name in ("bf16", *names)]
    rows = []
    for state in study.states():
        case = f"hidden states after {state.step} steps, loss {state.loss:.2f}"
        for method in methods:
            for metric, value, unit in study.errors(state, method):
                rows.append(BenchmarkRow(case, method.label, metric, float(f"{value:.4g}"), unit))
        _tell(case)
    return rows


def _training(study: "Study", seeds: int) -> list[BenchmarkRow]:
    methods = [FilteringMethod.parse(text) for text in study.spec.runs]
    losses: dict[str, list[Losses]] = {method.label: [] for method in methods}
    for seed in range(seeds):
        for method in methods:
            new = study.train(method, seed)
            losses[method.label].append(new)
            _tell(f"seed {seed}, {method.label}: held-out loss {new.all:.4f}, rare tokens {new.rare:.4f}")
    spec = study.spec
    size = f"{study.classes} classes, {spec.steps} steps of {spec.batch_size} x {spec.data.sequence_length}"
    size += "" if spec.model.tied else ", head not tied"
    return [*_compared(f"trained from scratch, {size}, {seeds} seeds", losses), *_by_seed(size, losses)]


def _compared(case: str, losses: "dict[str, list[Losses]]") -> Iterator[BenchmarkRow]:
    for label, made in losses.items():
        for name, field in (("loss", "all"), ("rare loss", "rare")):
            values = [getattr(item, field) for item in made]
            exact = [getattr(item, field) for item in losses[_EXACT]]
            differences = [value - base for value, base in zip(values, exact, strict=True)]
            yield BenchmarkRow(case, label, name, mean(values), "nats")
            yield BenchmarkRow(case, label, f"{name}, deviation", stdev(values), "nats")
            if label != _EXACT:
                yield BenchmarkRow(case, label, f"{name} minus exact", mean(differences), "nats")
                error = stdev(differences) / len(differences) ** 0.5
                yield BenchmarkRow(case, label, f"{name} minus exact, error", error, "nats")


def _by_seed(size: str, losses: "dict[str, list[Losses]]") -> Iterator[BenchmarkRow]:
    for title, field in (("held-out loss", "all"), ("held-out loss of rare tokens", "rare")):
        for label, made in losses.items():
            for seed, item in enumerate(made):
                yield BenchmarkRow(f"{title}, {size}", label, f"seed {seed}", getattr(item, field), "nats")


def _tell(text: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


FILTERING = Benchmark(
    "gradient filters: errors on hidden states, and losses of models trained with them; --repeats is seeds",
    run,
    repeats=5,
    draw=draw_filtering,
)
