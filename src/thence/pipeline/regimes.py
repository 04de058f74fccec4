"""When to leave SFT: the regimes of its held-out loss (arXiv 2512.11470, equations 5 to 9).

With L_min the smallest held-out loss of the whole stage, a measurement L is

- stable where L <= 1.02 L_min, and between the first and the last such one;
- adaptive before the first stable one;
- mild after the last stable one, while L stays below 1.10 L_min;
- severe from the first one on, after the last stable one, that reaches 1.10 L_min.

The paper tells the regimes apart once the stage is over. :class:`thence.pipeline.validation.Best` ends a stage that has
``stop = "held-out"`` at 1.10 times the smallest loss so far, which is the same bound, online.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Regime = Literal["adaptive", "stable", "mild", "severe"]
STABLE, SEVERE = 1.02, 1.10
"""Bounds of the regimes, as multiples of the smallest held-out loss."""


@dataclass(frozen=True)
class HeldOut:
    """A measurement of the held-out loss, and its regime.

    Args:
        step: of the stage, counted from 1.
        loss: nats a token.
        regime: see above.
    """

    step: int
    loss: float
    regime: Regime


def regimes(steps: Sequence[int], losses: Sequence[float]) -> list[HeldOut]:
    """The regime of every measurement of a stage, in the order of the steps.

    A loss that is not finite is never the smallest, and lies beyond every bound. Without a finite loss nothing is
    stable, and the list is empty.

    Args:
        steps: where the held-out loss was measured, ascending.
        losses: the measurements, nats a token.
    """
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return []
    least = min(finite)
    stable = [i for i, loss in enumerate(losses) if math.isfinite(loss) and loss <= STABLE * least]
    found: list[HeldOut] = []
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        if i < stable[0]:
            regime: Regime = "adaptive"
        elif i <= stable[-1]:
            regime = "stable"
        else:
            beyond = not loss < SEVERE * least
            regime = "severe" if beyond or found[-1].regime == "severe" else "mild"
        found.append(HeldOut(step, loss, regime))
    return found
