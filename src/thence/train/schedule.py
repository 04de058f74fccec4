"""Learning rates: linear warm-up, then constant, linear or cosine down to a floor."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, *, peak: float, schedule: str, warmup: float, floor: float) -> float:
    """The learning rate of one optimizer step.

    Args:
        step: which step, counted from 0.
        steps: how many there will be.
        peak: the highest learning rate.
        schedule: ``constant``, ``linear`` or ``cosine``.
        warmup: share of the steps over which it rises; the first step is never at zero.
        floor: share of the peak reached at the last step (linear, cosine).

    Raises:
        ValueError: there is no such schedule.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    done = (step - rising) / max(1, steps - 1 - rising)
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - (1 - floor) * min(1.0, done))
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
    raise ValueError(f"unknown schedule {schedule!r}: use constant, linear or cosine")
