"""What happens inside the loss while it trains: its distribution over examples, its gradient, its spikes.

B examples, K classes. A row is a row of logits: an example, or a token of a sequence.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lossworks.data.batch import Batch, first, on
from lossworks.losses.objective import ElementLosses
from lossworks.models import Outputs
from lossworks.specs import TelemetrySpec
from lossworks.tasks.interface import Measure
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import beside

Completed = Callable[[Batch], tuple[Batch, Mapping[str, Outputs]]]
"""From a batch of the task to the one that losses are given, and to what companions say of it, by role."""

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
_BEFORE = 64  # steps that a spike is measured against
_LEAST = 16  # of them, or no spread is known
_NAMED = 5  # examples of a spike that are named


class Telemetry:
    """Looks at a step's batch between the backward pass and the update, with the parameters of its loss.

    The extra forward passes take no gradient of parameters and leave the training as it is.

    Args:
        spec: What is asked for.
        losses: The trained loss of single elements.
        world: The ranks; all of them call.
        bf16: Run products in bfloat16.
        completed: Gives what the losses read of companions.
    """

    def __init__(
        self,
        spec: TelemetrySpec,
        losses: ElementLosses,
        world: World,
        *,
        bf16: bool,
        completed: Completed = lambda batch: (batch, {}),
    ) -> None:
        self._spec, self._losses, self._world, self._bf16 = spec, losses, world, bf16
        self._completed = completed
        self._watch = None if spec.spike is None else SpikeWatch(spec.spike)

    def look(
        self,
        step: int,
        loss: float,
        model: nn.Module,
        batches: Sequence[Batch],
        rows: np.ndarray,
    ) -> tuple[dict[str, float], str | None]:
        """Return what is due at a step: metrics by tracked name, and a sentence about a spike.

        Args:
            step: From 1.
            loss: Mean loss of the step over all ranks.
            model: The distributed model.
            batches: This rank's micro-batches.
            rows: Which examples of the training data they hold.
        """
        found: dict[str, float] = {}
        if self._spec.every and step % self._spec.every == 0:
            found |= self._distributions(model, batches[0])
        height = None if self._watch is None else self._watch.height(loss)
        if height is None:
            return found, None
        found["telemetry/spike"] = height
        return found, self._name(step, loss, height, model, batches, rows)

    def _distributions(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        a_row = math.prod(batch["targets"].shape[1:])
        count = max(1, self._spec.rows // a_row)
        own = self._forward(model, first(batch, count), self._losses.probe)
        # A collective needs equal lengths; NaN stands for a row that is not there.
        padded = own.new_full((len(own), count * a_row), math.nan)
        padded[:, : own.shape[1]] = own
        ranks = self._world.gather(padded.flatten().tolist())
        loss, slope, logits = ranks.reshape(self._world.size, *padded.shape).transpose(0, 1).flatten(1)
        slope = slope[~slope.isnan()]
        return {
            **_quantiles("loss", loss),
            **_quantiles("gradient_norm", slope),
            **_quantiles("logit_norm", logits),
            "telemetry/zero_gradient": float((slope == 0).double().mean()),
        }

    def _name(
        self,
        step: int,
        loss: float,
        height: float,
        model: nn.Module,
        batches: Sequence[Batch],
        rows: np.ndarray,
    ) -> str:
        """Return a sentence that names the examples of a step with the largest losses, over all ranks."""
        found = [self._forward(model, batch, self._losses.of_examples) for batch in batches]
        # The last micro-batch may be a stand-in for none, of ignored targets.
        own = torch.cat(found)[: len(rows)]
        worst = own.argsort(descending=True)[:_NAMED]
        named = np.full((_NAMED, 2), math.nan)
        named[: len(worst), 0] = rows[worst.numpy()]
        named[: len(worst), 1] = own[worst].numpy()
        pairs = self._world.gather(named.flatten().tolist()).reshape(-1, 2)
        pairs = pairs[~pairs.isnan().any(1)]
        top = pairs[pairs[:, 1].argsort(descending=True)][:_NAMED].tolist()
        text = ", ".join(f"{int(row)} ({value:.4g})" for row, value in top)
        return f"step {step}: the loss {loss:.4g} is {height:.1f} deviations above the steps before" + (
            f"; training examples with the largest losses: {text}" if top else ""
        )

    @torch.no_grad()
    def _forward(self, model: nn.Module, batch: Batch, look: Measure) -> Tensor:
        device = self._world.device
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            batch, companions = self._completed(batch)
            found = model(on(device, batch), beside(look, companions)).double().cpu()
        # FSDP leaves the root's parameters whole after a forward, apart from the gradients of their shards.
        if isinstance(model, FSDPModule):
            model.reshard()
        return cast("Tensor", found)


class SpikeWatch:
    """Says when a loss is far above those before it.

    Args:
        deviations: How far: in standard deviations, estimated as 1.4826 times the median absolute deviation
            from the median of the last 64 losses, which single spikes don't move.
    """

    def __init__(self, deviations: float) -> None:
        self._deviations = deviations
        self._before: deque[float] = deque(maxlen=_BEFORE)

    def height(self, loss: float) -> float | None:
        """Take the next loss; return its height in deviations if that is a spike."""
        before = np.array(self._before)
        self._before.append(loss)
        if len(before) < _LEAST:
            return None
        middle = float(np.median(before))
        # A loss that has not moved has no spread, and any rounding would be a spike.
        spread = max(1.4826 * float(np.median(np.abs(before - middle))), 1e-3 * abs(middle), 1e-12)
        height = (loss - middle) / spread
        return height if height > self._deviations else None


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    """Return quantiles of a distribution, without NaN; nothing where there is none."""
    known = values[~values.isnan()]
    if not len(known):
        return {}
    found = torch.quantile(known, known.new_tensor(list(QUANTILES.values())))
    return {f"telemetry/{name}_{which}": float(value) for which, value in zip(QUANTILES, found, strict=True)}
