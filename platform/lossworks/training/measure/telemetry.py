"""What happens inside the loss while it trains: its distribution over examples, its gradient, its spikes.

B examples, K classes. A row is a row of logits: an example, or a token of a sequence.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lossworks.data.batch import Batch, first, on
from lossworks.errors import LossSpikesError
from lossworks.losses.objective import ElementLosses
from lossworks.specs import SpikeSpec, TelemetrySpec
from lossworks.tasks.interface import Measure
from lossworks.training.distributed.world import World
from lossworks.training.evaluation import Completed, beside

QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
_BEFORE = 64  # steps that a spike is measured against
_LEAST = 16  # of them, or no spread is known
_NAMED = 5  # examples of a spike that are named


@dataclass(frozen=True)
class Look:
    """What telemetry found at a step.

    Attributes:
        metrics: By tracked name.
        complaint: A sentence about a spike, or None.
        left_out: Whether the batch must not change anything.
    """

    metrics: dict[str, float]
    complaint: str | None = None
    left_out: bool = False


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
        self._watch = None if spec.spike.height is None else SpikeWatch(spec.spike)

    def look(
        self,
        step: int,
        loss: float,
        model: nn.Module,
        batches: Sequence[Batch],
        rows: np.ndarray,
    ) -> Look:
        """Return what is due at a step, the same on every rank.

        Args:
            step: From 1.
            loss: Mean loss of the step over all ranks; NaN and infinity only where spikes are left out.
            model: The distributed model.
            batches: This rank's micro-batches.
            rows: Which examples of the training data they hold.

        Raises:
            LossSpikesError: On every rank: the loss is a spike once more than may be left out in a row.
        """
        height = None if self._watch is None else self._watch.height(loss)
        complaint = None if height is None else self._name(step, loss, height, model, batches, rows)
        if self._watch is not None and height is not None and self._spec.spike.leaves_out:
            self._watch.leave_out(step, height, str(complaint))
            return Look({}, complaint, left_out=True)
        found: dict[str, float] = {}
        if self._spec.every and step % self._spec.every == 0:
            found |= self._distributions(model, batches[0])
        if self._watch is not None:
            found |= self._watch.done(step)
        if height is not None:
            found["telemetry/spike"] = height
        return Look(found, complaint)

    def state(self) -> dict[str, Tensor]:
        """Return what decisions about spikes depend on, by name; empty where none are asked for."""
        return {} if self._watch is None else self._watch.state()

    def load_state(self, state: Mapping[str, Tensor], *, left_out: bool = True) -> None:
        """Go on from a state, or from none, as at the start.

        Args:
            state: As :meth:`state` gave it.
            left_out: Whether what was left out is taken from there, too, and not kept as it is now.
        """
        if self._watch is not None:
            self._watch.load_state(state, left_out=left_out)

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
        pairs = pairs[~pairs[:, 0].isnan()]
        top = pairs[pairs[:, 1].argsort(descending=True)][:_NAMED].tolist()
        text = ", ".join(f"{int(row)} ({value:.4g})" for row, value in top)
        far = f"{height:.1f} deviations above the steps before" if math.isfinite(height) else "not finite"
        return f"step {step}: the loss {loss:.4g} is {far}" + (
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
    """Says when a loss is far above those before it, and how often batches were left out for that.

    Deviations are standard deviations, estimated as 1.4826 times the median absolute deviation from the
    median of the last 64 losses, which single spikes don't move. Where spikes are left out their losses are
    not among the 64, and a loss that is not finite is a spike of infinite height.

    Args:
        spec: How far is far, and what is done then.
    """

    def __init__(self, spec: SpikeSpec) -> None:
        self._spec = spec
        self._before: deque[float] = deque(maxlen=_BEFORE)
        self._in_a_row = self._total = self._step = 0
        self._height = 0.0

    def height(self, loss: float) -> float | None:
        """Take the next loss; return its height in deviations if that is a spike."""
        height = self._above(loss)
        spike = self._spec.height is not None and height > self._spec.height
        if not (spike and self._spec.leaves_out):
            self._before.append(loss)
        return height if spike else None

    def _above(self, loss: float) -> float:
        if self._spec.leaves_out and not math.isfinite(loss):
            return math.inf
        before = np.array(self._before)
        if len(before) < _LEAST:
            return 0.0
        middle = float(np.median(before))
        # A loss that has not moved has no spread, and any rounding would be a spike.
        spread = max(1.4826 * float(np.median(np.abs(before - middle))), 1e-3 * abs(middle), 1e-12)
        return (loss - middle) / spread

    def leave_out(self, step: int, height: float, complaint: str) -> None:
        """Count a batch that is left out at a step, from 1.

        Raises:
            LossSpikesError: There were as many in a row as may be.
        """
        if self._in_a_row == self._spec.most:
            raise LossSpikesError(
                f"{complaint}; it is the spike number {self._in_a_row + 1} in a row, and "
                f"telemetry.spike.most={self._spec.most} are left out",
                step=step,
            )
        self._in_a_row, self._total = self._in_a_row + 1, self._total + 1
        self._step, self._height = max(step, self._step), height

    def done(self, step: int) -> dict[str, float]:
        """Take note that a step is done; return what was left out before it was, as metrics."""
        # After a rollback the steps before the spike come again, and are no progress.
        if step < self._step or not self._in_a_row:
            return {}
        self._in_a_row = 0
        return {"telemetry/spike": self._height, "telemetry/left_out": float(self._total)}

    def state(self) -> dict[str, Tensor]:
        """Return the losses before, float64 (64,) with NaN for none, and what was left out, float64 (4,)."""
        losses = torch.full((_BEFORE,), math.nan, dtype=torch.float64)
        losses[: len(self._before)] = torch.tensor(list(self._before), dtype=torch.float64)
        counts = (self._in_a_row, self._total, self._step, self._height)
        return {"losses": losses, "left_out": torch.tensor(counts, dtype=torch.float64)}

    def load_state(self, state: Mapping[str, Tensor], *, left_out: bool = True) -> None:
        """Go on from a state; see :meth:`Telemetry.load_state`."""
        losses = state["losses"].tolist() if state else []
        self._before = deque((loss for loss in losses if not math.isnan(loss)), maxlen=_BEFORE)
        if left_out:
            *counts, self._height = state["left_out"].tolist() if state else [0.0] * 4
            self._in_a_row, self._total, self._step = map(int, counts)


def _quantiles(name: str, values: Tensor) -> dict[str, float]:
    """Return quantiles of a distribution, without NaN; nothing where there is none."""
    known = values[~values.isnan()]
    if not len(known):
        return {}
    found = torch.quantile(known, known.new_tensor(list(QUANTILES.values())))
    return {f"telemetry/{name}_{which}": float(value) for which, value in zip(QUANTILES, found, strict=True)}
