"""``lossworks bench train``: our Ray run beside a bare torch.distributed loop with a dense head."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lossworks.benchmarks.command import Benchmark
from lossworks.benchmarks.table import BenchmarkRow
from lossworks.errors import RunError
from lossworks.tasks.text.language_model import TrainSpec

# Enough steps that the first few, in which caches fill and processes settle, can be left out.
_WARMUP_STEPS = 5
_SPEC = {
    "name": "bench-train",
    "steps": 25,
    "batch_size": 32,
    "workers": 2,
    "data": {
        "corpus": "stdlib",
        "max_bytes": 16 * 2**20,
        "tokenizer_bytes": 4 * 2**20,
        "vocab_size": 16384,
        "sequence_length": 128,
    },
    "model": {"layers": 4, "width": 256, "heads": 4},
    "schedule": {"kind": "constant"},  # the bare loop has none
    "evaluation": {"every": 1000, "sequences": 1},
    "checkpoint": {"every": 1000},
}
_OURS, _BARE = "lossworks on Ray, linear cross-entropy, MLflow", "bare torch.distributed, dense head"


def run(overrides: Sequence[str], repeats: int) -> list[BenchmarkRow]:
    """Run both methods in turns, ``repeats`` times each, on the same model and batches.

    Returns:
        Tokens/s of each (the median over steps, then over runs), their ratio, how far the
        first losses differ, and the seconds from our call to the end of the first step.

    Raises:
        RunError: One of the methods failed.
    """
    from lossworks.data import prepare

    spec = TrainSpec.parse(_SPEC).override(overrides)
    corpus = prepare(spec.text()).folder
    ours, bare = [], []
    for _ in range(repeats):
        bare.append(_run_bare(spec, corpus))
        ours.append(_run_ours(spec))
    tokens = spec.batch_size * spec.data.sequence_length
    speed = {
        name: tokens / statistics.median(_settled(result["seconds"]) for result in results)
        for name, results in ((_OURS, ours), (_BARE, bare))
    }
    case = (
        f"{spec.workers} workers, {spec.sharding}, vocabulary {spec.data.vocab_size}, "
        f"width {spec.model.width}, {spec.batch_size} x {spec.data.sequence_length} tokens a step"
    )
    # Later steps grow apart: AdamW's first steps turn rounding errors of tiny gradients into whole steps.
    pairs = zip(ours[0]["losses"][:5], bare[0]["losses"][:5], strict=True)
    difference = max(abs(a - b) for a, b in pairs)
    return [
        *(BenchmarkRow(case, name, "throughput", value, "tokens/s") for name, value in speed.items()),
        BenchmarkRow(case, _OURS, "throughput over bare", speed[_OURS] / speed[_BARE], "x"),
        BenchmarkRow(case, _OURS, "largest difference of the first 5 losses", difference, "nats"),
        BenchmarkRow(case, _OURS, "call to first step", statistics.median(r["start"] for r in ours), "s"),
    ]


def _settled(seconds: list[float]) -> float:
    return statistics.median(seconds[_WARMUP_STEPS:] or seconds)


def _run_ours(spec: TrainSpec) -> dict[str, Any]:
    from lossworks.tracking import read_all
    from lossworks_jobs.training.train import train

    result = train(spec)
    rows = [row["metrics"] for row in read_all(result.folder.journal)]
    seconds = [row["train/step_seconds"] for row in rows]
    return {
        "seconds": seconds,
        "losses": [row["train/loss"] for row in rows],
        "start": sum(result.start_up.values()),
    }


def _run_bare(spec: TrainSpec, corpus: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "spec.yaml", Path(folder) / "result.json"
        file.write_text(spec.to_yaml())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(spec.workers), "-m", "lossworks.benchmarks.bare_distributed"]
        done = subprocess.run(
            [*command, str(file), str(corpus), str(result)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RunError(f"the bare loop failed: {done.stderr.strip().splitlines()[-1]}")
        found: dict[str, Any] = json.loads(result.read_text())
        return found


TRAIN_BENCHMARK = Benchmark(
    "our two-worker Ray run over a bare torch.distributed loop with a dense head", run
)
