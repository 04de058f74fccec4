"""Made-up comparisons with known effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from thence.compare.result import Arm, Column, Comparison, Measured, Run, Spent, Try

COLUMNS = (Column("test", 0.6), Column("ood", 0.6))


def make_run(
    arm: str,
    base: str,
    seed: int,
    right: Mapping[Column, Sequence[int]],
    samples: int = 2,
    flops: float = 1e12,
    **parts: Any,
) -> Run:
    spent = Spent(40, int(flops / 6e6), 0, flops, 1.3 * flops, 60.0)
    measured = tuple(Measured(column, tuple(map(int, of)), samples, 40.0, 1, 0) for column, of in right.items())
    return Run(arm, base, seed, parts.pop("settings", {}), spent, spent, measured, parts.pop("curve", {}), **parts)


def curve_of(kind: str, rng: np.random.Generator, level: float, steps: int = 60) -> dict[str, tuple[float, ...]]:
    step = np.arange(1, steps + 1)
    noise = rng.normal(0, 0.03, steps)
    if kind == "sft":
        values = {"loss": 1.2 * np.exp(-step / 15) + 0.3 + noise, "grad_norm": 1 + level + noise}
    else:
        values = {"reward": level + 0.2 * (1 - np.exp(-step / 25)) + noise, "entropy": 0.4 - step / 400 + noise / 5}
        values["response_tokens"] = 45 - step / 20 + 10 * noise
    return {name: tuple(map(float, series)) for name, series in {"step": step, **values}.items()}


def make_comparison(
    effects: Mapping[str, float],
    *,
    arms: Sequence[Arm] = (),
    bases: Sequence[str] = ("rich",),
    seeds: int = 5,
    problems: int = 200,
    samples: int = 2,
    seed_sd: float = 0.1,
    problem_sd: float = 1.5,
    columns: Sequence[Column] = COLUMNS,
    flops: Mapping[str, float] | None = None,
    draw: int = 0,
    **fields: Any,
) -> Comparison:
    """A comparison in which an arm's accuracy on a problem is the logistic of effect + seed + problem.

    Args:
        effects: in log-odds, by arm; the first arm is the reference.
        arms: descriptions; default: plain ones.
        seed_sd, problem_sd: spread of runs of an arm, and of problems, in log-odds. Problems are shared by all runs.
        flops: spent, by arm; default 1e12.
        draw: of all this.
        fields: of the comparison.
    """
    rng = np.random.default_rng(draw)
    about = {arm.name: arm for arm in arms} or {
        name: Arm(name, name.upper(), kind="rl", method="grpo") for name in effects
    }
    hardness = {(base, c): rng.normal(0, problem_sd, problems) for base in bases for c in columns}
    runs = []
    for name, effect in effects.items():
        for base in bases:
            for seed in range(seeds):
                own = effect + rng.normal(0, seed_sd)
                chance = {c: 1 / (1 + np.exp(hardness[base, c] - own)) for c in columns}
                right = {c: rng.binomial(samples, p) for c, p in chance.items()}
                kind = about[name].kind
                curve = curve_of(kind, rng, float(np.mean(chance[columns[0]]))) if kind else {}
                cost = (flops or {}).get(name, 1e12)
                runs.append(make_run(name, base, seed, right, samples, cost, curve=curve, settings={"lr": 2e-4}))
    tries = [
        Try(name, base, {"lr": lr}, 0.3 + 100 * lr, lr == 4e-4)
        for name in effects
        for base in bases
        for lr in (1e-4, 2e-4, 4e-4)
        if about[name].kind
    ]
    given: dict[str, Any] = {
        "name": "trial",
        "description": "a made-up comparison",
        "reference": next(iter(effects)),
        "budget": "1e12 FLOPs",
        "tries": tuple(tries),
    } | fields
    return Comparison(
        bases=tuple(bases),
        seeds=tuple(range(seeds)),
        columns=tuple(columns),
        arms=tuple(about[name] for name in effects),
        runs=tuple(runs),
        **given,
    )
