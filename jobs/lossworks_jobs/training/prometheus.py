"""The figures of a run at Ray's own metrics endpoint, for Prometheus.

Every node of a Ray cluster answers a scrape with what its workers have set, with ``ray_`` before each name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

_TAGS = ("run", "name", "rank")
_SECONDS = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


@dataclass(frozen=True)
class Exported:
    """One metric of the endpoint.

    Attributes:
        name: Without Ray's prefix.
        kind: A counter adds its source up, a histogram counts its values, a gauge shows the last.
        source: Tracked name of what it shows; one that ends in a slash is a family, by the tag ``phase``.
        description: Its help text.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    source: str
    description: str

    @property
    def series(self) -> tuple[str, ...]:
        """Return the names under which Prometheus finds it."""
        ends = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
        return tuple(f"ray_{self.name}{end}" for end in ends[self.kind])


STEPS = Exported("lossworks_steps", "counter", "", "optimiser steps done")
EXPORTED = (
    STEPS,
    Exported("lossworks_step_seconds", "histogram", "train/step_seconds", "seconds of an optimiser step"),
    Exported("lossworks_tokens_per_second", "gauge", "train/tokens_per_second", "tokens a second, all ranks"),
    Exported(
        "lossworks_examples_per_second", "gauge", "train/examples_per_second", "examples a second, all ranks"
    ),
    Exported("lossworks_train_loss", "gauge", "train/loss", "training loss of the last step"),
    Exported("lossworks_held_out_loss", "gauge", "eval/loss", "loss at the last evaluation"),
    Exported("lossworks_mfu", "gauge", "train/mfu", "model FLOPs utilisation, of the maker's peak"),
    Exported(
        "lossworks_mfu_of_measured_peak",
        "gauge",
        "train/mfu_of_measured_peak",
        "model FLOPs utilisation, of the best product measured",
    ),
    Exported(
        "lossworks_data_wait_seconds",
        "counter",
        "train/data_wait_seconds",
        "seconds spent on reading batches",
    ),
    Exported(
        "lossworks_checkpoint_seconds", "counter", "train/checkpoint_seconds", "seconds spent on checkpoints"
    ),
    Exported(
        "lossworks_time_share", "gauge", "time/", "share of the time since the last evaluation, by phase"
    ),
)
MEMORY = Exported(
    "lossworks_peak_memory_bytes", "gauge", "train/peak_memory_bytes", "most memory of a rank so far"
)


class Exporter:
    """Sets the metrics of one rank's process.

    Args:
        run: Id of the run.
        name: Of the run.
        rank: Of this process.
    """

    def __init__(self, *, run: str, name: str, rank: int) -> None:
        # Ray's metrics take ASCII alone, and would end the training at the ä of a name.
        plain = name.encode("ascii", "backslashreplace").decode()
        self._tags = {"run": run, "name": plain, "rank": str(rank)}
        self._own = {MEMORY: self._make(MEMORY)}
        self._run = {exported: self._make(exported) for exported in EXPORTED} if rank == 0 else {}

    def record(self, metrics: Mapping[str, float]) -> None:
        """Take the figures of a step over all ranks, by their tracked names; rank 0 calls."""
        self._run[STEPS].inc(1.0)
        for exported, metric in self._run.items():
            _show(exported, metric, metrics)

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Take what this rank has measured of itself at a step."""
        for exported, metric in self._own.items():
            _show(exported, metric, metrics)

    def _make(self, exported: Exported) -> Any:
        from ray.util import metrics

        tags = (*_TAGS, "phase") if exported.source.endswith("/") else _TAGS
        if exported.kind == "histogram":
            made: Any = metrics.Histogram(exported.name, exported.description, _SECONDS, tags)
        else:
            kind = metrics.Counter if exported.kind == "counter" else metrics.Gauge
            made = kind(exported.name, exported.description, tags)
        return made.set_default_tags(self._tags | ({"phase": ""} if "phase" in tags else {}))


def _show(exported: Exported, metric: Any, metrics: Mapping[str, float]) -> None:
    if exported.source.endswith("/"):
        for name, value in metrics.items():
            if name.startswith(exported.source):
                metric.set(value, tags={"phase": name.removeprefix(exported.source)})
        return
    value = metrics.get(exported.source, math.nan)
    if not math.isfinite(value):
        return
    if exported.kind == "gauge":
        metric.set(value)
    elif exported.kind == "histogram":
        metric.observe(value)
    elif value > 0:  # a counter takes nothing else
        metric.inc(value)
