"""Curves of training across arms and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thence.compare.result import Arm, Comparison, Run
from thence.compare.sections import Dynamics, Training

UNITS = {
    "loss": "loss",
    "grad_norm": "gradient norm before clipping",
    "reward": "reward, mean over rollouts",
    "response_tokens": "response length, tokens",
    "entropy": "entropy, nats a token",
}
"""Quantities with their units."""


@dataclass(frozen=True)
class Series:
    """One arm's line: steps, mean, and lowest and highest run. ``blocks``: base and seed of these runs."""

    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    blocks: tuple[tuple[str, int], ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of these runs."""
        return tuple(seed for _, seed in self.blocks)


def quantities_of(section: Training | Dynamics) -> Sequence[str]:
    """The quantities of a section, or those of its kind."""
    default = ("loss", "grad_norm") if isinstance(section, Training) else ("reward", "response_tokens", "entropy")
    return section.quantities or default


def training_series(
    section: Training | Dynamics, comparison: Comparison, arm: Arm, base: str, quantity: str
) -> Series | None:
    """One seed's curve: the section's, or the first that the arm has. None where there is no such curve."""
    seed = section.seed if isinstance(section, Training) else None
    for run in comparison.runs_of(arm.name, base):
        if seed in (None, run.seed) and (curve := _curve(run, quantity, section.smooth)):
            steps, values = tuple(curve), tuple(curve.values())
            return Series(steps, values, values, values, ((run.base, run.seed),))
    return None


def dynamics_series(
    section: Training | Dynamics, comparison: Comparison, arm: Arm, base: str, quantity: str
) -> Series | None:
    """Mean and range over the runs, at the steps that all of them reached. None where there is no curve."""
    found = {(run.base, run.seed): _curve(run, quantity, section.smooth) for run in comparison.runs_of(arm.name, base)}
    curves = {block: curve for block, curve in found.items() if curve}
    if not curves:
        return None
    steps = sorted(set.intersection(*(set(curve) for curve in curves.values())))
    across = [[curve[step] for curve in curves.values()] for step in steps]
    means = tuple(sum(values) / len(values) for values in across)
    return Series(tuple(steps), means, tuple(map(min, across)), tuple(map(max, across)), tuple(sorted(curves)))


def _curve(run: Run, quantity: str, smooth: int) -> dict[float, float]:
    """A run's quantity by step, means of ``smooth`` steps each (the last of fewer), at the middle of them."""
    values = run.curve.get(quantity, ())
    steps = run.curve.get("step") or tuple(range(1, len(values) + 1))
    known = [(s, v) for s, v in zip(steps, values, strict=True) if s is not None and v is not None]
    parts = [known[start : start + smooth] for start in range(0, len(known), smooth)]
    return {sum(s for s, _ in part) / len(part): sum(v for _, v in part) / len(part) for part in parts}
