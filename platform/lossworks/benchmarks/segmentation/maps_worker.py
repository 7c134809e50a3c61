"""One measurement of ``lossworks bench segmentation`` in a process of its own; prints the figures as JSON."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lossworks.benchmarks.segmentation.boundary_matrices import plain_matching
from lossworks.benchmarks.worker import median_seconds, peak_growth
from lossworks.data.images.drawings.drawn import draw_masked
from lossworks.losses import create
from lossworks.losses.interface import Loss
from lossworks.metrics.betti_matching import betti_matching
from lossworks.models.segmentation import Segmenter, build_segmenter
from lossworks.specs.tasks.segmenter import SegmenterSpec

_BESIDE = "ce-dice"
_CHANNELS, _CLASSES = 3, 2
_PLAIN = 64  # pixels a side up to which boundary matrices are reduced as well


def _model(case: dict[str, Any]) -> Segmenter:
    spec = SegmenterSpec.parse(case["model"])
    return build_segmenter(spec, channels=_CHANNELS, classes=_CLASSES, seed=case["seed"])


def _masks(count: int, side: int, seed: int) -> np.ndarray:
    """Return masks of thin structures, (count, side, side) int64, as losses of connectedness meet them."""
    return np.stack([draw_masked("walls", number, side, seed)[1] for number in range(count)])


def measure_step(case: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Return the seconds of a step of a loss, and how many times those of CE+Dice they are."""
    model = _model(case)
    generator = torch.Generator().manual_seed(case["seed"])
    inputs = torch.randn(case["images"], _CHANNELS, case["side"], case["side"], generator=generator)
    targets = torch.from_numpy(_masks(case["images"], case["side"], case["seed"]))
    own, plain = (_step(model, create(slug), inputs, targets) for slug in (case["slug"], _BESIDE))
    own()
    seconds, beside = median_seconds((own, plain), case["repeats"], "cpu")
    return [("over CE+Dice", seconds / beside, "x"), ("step", 1000 * seconds, "ms")]


def _step(model: Segmenter, loss: Loss, inputs: Tensor, targets: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad()
        loss.of(model.outputs(inputs), {"inputs": inputs, "targets": targets}).backward()

    return step


def measure_matching(case: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Return the seconds of the matching of a map's bars with a mask's, and how many times faster that is."""
    mask = _masks(1, case["side"], case["seed"])[0].astype(np.float64)
    stream = np.random.default_rng(case["seed"])
    noise = stream.random(mask.shape)
    smooth = ndimage.gaussian_filter(mask + 0.3 * stream.standard_normal(mask.shape), 1.0)
    first = noise if case["map"] == "noise" else smooth
    betti_matching(first, mask)
    (seconds,) = median_seconds((lambda: betti_matching(first, mask),), case["repeats"], "cpu")
    figures = [("matching", 1000 * seconds, "ms")]
    if case["side"] <= _PLAIN:
        began = time.perf_counter()
        plain_matching(first, mask, 4)
        figures.append(("faster than the plain reduction", (time.perf_counter() - began) / seconds, "x"))
    return figures


def measure_image(case: dict[str, Any]) -> list[tuple[str, float, str]]:
    """Return the seconds and the memory that the classes of a large image take."""
    model = _model(case).eval()
    if not case["windows"]:
        model.window = 0
    generator = torch.Generator().manual_seed(case["seed"])
    image = torch.randn(1, _CHANNELS, case["side"], case["side"], generator=generator)
    model.classes_of(image[..., :64, :64])
    began = time.perf_counter()
    growth, _, _ = peak_growth(lambda: (model.classes_of(image).double().mean(),), "cpu")
    return [("time", time.perf_counter() - began, "s"), ("peak memory", growth / 2**20, "MiB")]


def main() -> None:
    """Measure the case in the first argument."""
    case = json.loads(sys.argv[1])
    torch.set_num_threads(case["threads"])
    measures = {"step": measure_step, "matching": measure_matching, "image": measure_image}
    print(json.dumps({"figures": measures[case["what"]](case)}), flush=True)


if __name__ == "__main__":
    main()
