"""The learning rate as a factor of its peak."""

import math

from lossworks.specs import ScheduleSpec


def lr_factor(spec: ScheduleSpec, *, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate at ``step``, in [0, 1].

    Warm-up grows linearly and reaches 1 at step ``warmup_steps``. Then, with r the share of the remaining
    steps that are done and f the ``final_fraction``: constant stays at 1; linear is 1 − (1 − f)·r; cosine is
    f + (1 − f)·(1 + cos πr)/2 (Loshchilov and Hutter 2017, one cycle); wsd stays at 1 until the last
    ``decay_steps``, over which it is linear (Hu et al. 2024, MiniCPM) or, with ``decay=1-sqrt``,
    1 − (1 − f)·√r (Hägele et al. 2024); inverse-sqrt is √(warmup_steps / step) (Vaswani et al. 2017), with a
    warm-up of 1 where there is none.

    Args:
        spec: The schedule.
        step: Counted from 1 to ``steps``.
        steps: Of the whole run.
    """
    if step <= spec.warmup_steps:
        return step / spec.warmup_steps
    if spec.kind == "constant":
        return 1.0
    if spec.kind == "inverse-sqrt":
        return math.sqrt(max(spec.warmup_steps, 1) / step)
    start = steps - spec.decay_steps if spec.kind == "wsd" else spec.warmup_steps
    if step <= start:
        return 1.0
    done = (step - start) / (steps - start)
    if spec.kind == "cosine":
        return spec.final_fraction + (1 - spec.final_fraction) * (1 + math.cos(math.pi * done)) / 2
    if spec.decay == "1-sqrt":
        done = math.sqrt(done)
    return 1 - (1 - spec.final_fraction) * done
