"""``lossworks bench segmentation``: what losses of maps cost beside CE+Dice, and how large images are read.

Every figure is measured in a process of its own. Losses train the same U-Net on the same images, a whole step
of forward and backward pass, in turns with CE+Dice.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from lossworks.benchmarks.command import COMMAS, Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.benchmarks.worker import Measurement, measured, run_worker
from lossworks.catalogue.registry import declarations
from lossworks.errors import RunError, require_one
from lossworks.specs import Spec
from lossworks.specs.tasks.segmenter import SegmenterSpec

_WORKER = "lossworks.benchmarks.segmentation.maps_worker"
_MATCHED = "betti-matching"


class SegmentationBenchmarkSpec(Spec):
    """What ``lossworks bench segmentation`` measures; lists may be written with commas."""

    model: SegmenterSpec = SegmenterSpec()
    losses: Annotated[tuple[str, ...] | None, COMMAS] = Field(None, description="slugs; unset, all of maps")
    sides: Annotated[tuple[int, ...], COMMAS] = Field((128, 256), description="pixels a side of the images")
    images: int = Field(4, ge=1, description="images of a step")
    matched_sides: Annotated[tuple[int, ...], COMMAS] = Field(
        (64, 256), description="pixels a side of the maps whose bars are matched"
    )
    large: int = Field(2048, ge=16, description="pixels a side of the image that is read by windows")
    threads: int = Field(2, ge=1, le=1024, description="threads of the CPU")
    seed: int = Field(0, ge=0, description="seed of parameters and images")
    limit_s: float = Field(1800.0, gt=0.0, description="seconds after which a measurement is given up")

    @field_validator("losses")
    @classmethod
    def _are_losses(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            require_one(name, _losses(), "loss of maps")
        return value


def _losses() -> list[str]:
    return [
        slug for slug, entry in declarations("losses").items() if entry.kind == "map" and not entry.requires
    ]


def run(overrides: Sequence[str], repeats: int) -> Iterator[BenchmarkRow]:
    """Measure the losses, the matching of bars and a large image; progress goes to standard error.

    Yields:
        For every loss and side: seconds of a step over those with CE+Dice. For the matching: seconds of a map
        and how many times faster than the plain reduction of boundary matrices it is, where that ends. For
        the large image: seconds and peak memory by windows, and whole.
    """
    spec = SegmentationBenchmarkSpec().override(overrides)
    yield from measured(_measurements(spec, repeats), ())


def _measurements(spec: SegmentationBenchmarkSpec, repeats: int) -> list[Measurement]:
    shared = {"model": spec.model.model_dump(mode="json"), "threads": spec.threads, "seed": spec.seed}
    shared |= {"repeats": repeats}
    found = []
    for side in spec.sides:
        case = f"a step of {spec.images} images of {side} x {side}, {spec.threads} threads"
        for slug in spec.losses or _losses():
            values = {"what": "step", "slug": slug, "side": side, "images": spec.images, **shared}
            found.append(_measurement(spec, case, slug, values))
    for side in spec.matched_sides:
        for kind in ("prediction", "noise"):
            case = f"matching of the bars of a {side} x {side} {kind}, one thread"
            values = {"what": "matching", "side": side, "map": kind, **shared, "threads": 1}
            found.append(_measurement(spec, case, _MATCHED, values))
    case = f"classes of an image of {spec.large} x {spec.large}, {spec.threads} threads"
    for way in ("by windows", "whole"):
        values = {"what": "image", "side": spec.large, "windows": way == "by windows", **shared}
        found.append(_measurement(spec, case, way, values))
    return found


def _measurement(
    spec: SegmentationBenchmarkSpec, case: str, method: str, values: Mapping[str, Any]
) -> Measurement:
    def measure() -> list[BenchmarkRow]:
        try:
            found = run_worker(_WORKER, values, values["threads"], spec.limit_s)
        except RunError as error:
            return [BenchmarkRow(case, method, "not measured", None, "", f"failed: {error}")]
        return [BenchmarkRow(case, method, name, value, unit) for name, value, unit in found["figures"]]

    return Measurement(case, method, measure)


SEGMENTATION = Benchmark("losses of maps beside CE+Dice, matching of bars, and large images", run, repeats=5)
