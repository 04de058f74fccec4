"""Changes that have a number: it is solved for, in closed form or along a line, over all steps of a case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from thence.audit.policy.change import Hypothesis, setting
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Observed, Variant, worst
from thence.audit.policy.predict import (
    beside_weights,
    correction_ratios,
    log_ratios,
    trained_tokens,
)

FEW = 24
"""Points of a first look along a line."""


def solved(observed: Sequence[Observed], variants: Sequence[Variant]) -> list[Hypothesis]:
    """The changes with a number, each at the number that fits best; the likely ones first."""
    asked = variants[0].asked
    return [
        *scaled(observed, variants), *_bounds(observed, variants), *coefficients(observed, variants),
        *_lines(observed, variants, asked),
    ]  # fmt: skip


def scaled(observed: Sequence[Observed], variants: Sequence[Variant]) -> Iterator[Hypothesis]:
    """All weights times one number, where the size of the update is known."""
    if not all(o.system.sized for o in observed):
        return
    spreads = [o.spread(v) for o, v in zip(observed, variants, strict=True)]
    products = [system.moments(np.zeros(system.count), spread) for system, spread in spreads]
    size, towards = sum(m[0, 0] for m, _ in products), sum(r[0] for _, r in products)
    if size <= 0 or towards <= 0:
        return
    factor = float(towards / size)
    step = variants[0].step
    micro, ranks = int(step.micro_batch.max(initial=0)) + 1, int(step.rank.max(initial=0)) + 1
    found = "scale"
    for name, number in (("scale-accumulation", micro), ("scale-ranks", ranks)):
        if number > 1 and min(abs(factor * number - 1), abs(factor / number - 1)) < 1e-2:
            found = name
            break
    detail = f"the update is {factor:.4g} times what it should be"
    yield Hypothesis(found, "size", detail, lambda v: replace(v, factor=v.factor * factor))


def coefficients(observed: Sequence[Observed], variants: Sequence[Variant]) -> Iterator[Hypothesis]:
    """Another coefficient of the KL in the loss, or a KL where none was asked for: linear in it."""
    asked = variants[0].asked
    yield from _mixture(observed, variants)
    if asked.kl_in == "reward" and asked.kl:
        return
    names = [asked.estimator] if asked.kl else ["k3", "k2", "k1"]
    for name in (n for n in names if not n.startswith("full")):
        number = _linear(observed, variants, kl_in="loss", estimator=name)
        if number is None or abs(number) < 1e-9:
            continue
        if asked.kl:
            found = "kl-coefficient" if number * asked.kl > 0 else "kl-sign"
            detail = f"the coefficient of the KL is {number:.4g}, where {asked.kl:g} was asked for"
        else:
            found = "kl-coefficient"
            detail = f"a KL ({name}) with coefficient {number:.4g} is in the loss, where none was asked for"
        yield setting(found, "KL coefficient", detail, kl=number, kl_in="loss", estimator=name)


def beside(observed: Sequence[Observed], variants: Sequence[Variant]) -> Iterator[Hypothesis]:
    """An entropy bonus and an exact KL: gradients that are no weights of tokens."""
    asked = variants[0].asked
    exact = () if asked.divergence != "none" else ("full-forward" if asked.forward else "full",)
    for name in ("entropy", *exact):
        number = _linear_beside(observed, variants, name)
        if number is None or abs(number) < 1e-9:
            continue
        if name == "entropy":
            detail = f"an entropy bonus of {number:.4g} is in the loss, where {asked.entropy:g} was asked for"
            yield setting("entropy-bonus", "entropy", detail, entropy=number)
            continue
        found = "kl-estimator" if asked.kl and asked.estimator != name else "kl-coefficient"
        detail = f"a KL over the whole vocabulary, with coefficient {number:.4g}, is in the loss; "
        detail += f"{asked.kl:g} times {asked.estimator} was asked for" if asked.kl else "none was asked for"
        yield setting(found, "KL estimator", detail, kl=number, estimator=name, kl_in="loss")


def _linear(observed: Sequence[Observed], variants: Sequence[Variant], **settings: str) -> float | None:
    """The coefficient of a KL that brings the prediction nearest."""
    return _coefficient(observed, variants, "kl", **settings)


def _coefficient(observed: Sequence[Observed], variants: Sequence[Variant], name: str, **settings: str) -> float | None:
    """The value of a setting in which the weights are linear that brings the prediction nearest."""
    parts = []
    for o, v in zip(observed, variants, strict=True):
        none, one = (replace(v, asked=replace(v.asked, **{**settings, name: x})) for x in (0.0, 1.0))
        (system, base), (_, with_one) = o.spread(none), o.spread(one)
        parts.append(system.moments(base, with_one - base))
    return _number(parts)


def _mixture(observed: Sequence[Observed], variants: Sequence[Variant]) -> Iterator[Hypothesis]:
    """Other coefficients of what a method mixes."""
    asked, steps = variants[0].asked, [v.step for v in variants]
    shown = any(step.demonstrated().any() for step in steps)
    begun = any(step.begun().any() for step in steps) and asked.prefix in ("likelihood", "bounded")
    right = asked.own == "correctness"
    for name, there, found, part, words in (
        ("demonstration_weight", shown, "demonstration-weight", "coefficient of demonstrations", "demonstrations"),
        ("demonstration_likelihood", shown, "demonstration-weight", "coefficient of demonstrations",
         "the likelihood of demonstrations beside their surrogate"),
        ("own_weight", shown and not right, "policy-weight", "coefficient of the policy", "the policy's own responses"),
        ("right_weight", right, "policy-weight", "weight of right and wrong", "right responses"),
        ("wrong_weight", right, "policy-weight", "weight of right and wrong", "wrong responses"),
        ("prefix_weight", begun, "prefix-weight", "prefixes", "the likelihood of prefixes"),
    ):  # fmt: skip
        number = _coefficient(observed, variants, name) if there else None
        if number is not None:
            detail = f"the coefficient of {words} is {number:.4g}, where {getattr(asked, name):g} was asked for"
            yield setting(found, part, detail, **{name: number})


def _linear_beside(observed: Sequence[Observed], variants: Sequence[Variant], name: str) -> float | None:
    parts = []
    for o, v in zip(observed, variants, strict=True):
        none = replace(v.asked, entropy=0.0) if name == "entropy" else replace(v.asked, kl=0.0)
        unit = {"entropy": 1.0} if name == "entropy" else {"kl": 1.0, "estimator": name, "kl_in": "loss"}
        system, size = o.wide(), len(v.step.row)
        base = system.spread(replace(v, asked=none).weights())
        base[-2 * size :] += np.concatenate(beside_weights(v.step, none, v.other))
        vary = np.zeros(system.count)
        one = beside_weights(v.step, replace(none, **unit), v.other)
        two = beside_weights(v.step, none, v.other)
        vary[-2 * size :] = np.concatenate([a - b for a, b in zip(one, two, strict=True)])
        parts.append(system.moments(base, vary))
    return _number(parts)


def _number(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    matrix, right = sum(m for m, _ in parts), sum(r for _, r in parts)
    found = np.linalg.lstsq(np.asarray(matrix), np.asarray(right), rcond=1e-14)[0]
    if len(found) == 1:
        return float(found[0])
    return float(found[1] / found[0]) if found[0] > 0 else None


def _bounds(observed: Sequence[Observed], variants: Sequence[Variant]) -> Iterator[Hypothesis]:
    """Other bounds of the ratio and of importance weights: any value between two neighbouring ratios is the same."""
    asked = variants[0].asked
    if asked.ratio != "none":
        ratios = [np.exp(log_ratios(v.step, asked, trained_tokens(v.step, asked))) for v in variants]
        points = np.unique(np.concatenate(ratios))
        # A bound so near one would free every token of a first step to have any weight, and so explain anything.
        near = 2 * observed[0].width
        above, below = points[points > np.exp(near)], points[points < np.exp(-near)]
        words = "the ratio is clipped {} {}, where {:.4g} was asked for"

        def high(x: float) -> PolicyObjective:
            return replace(asked, clip_high=x - 1)

        def low(x: float) -> PolicyObjective:
            return replace(asked, clip_low=1 - x)

        def both(x: float) -> PolicyObjective:
            return replace(asked, clip_low=x - 1, clip_high=x - 1)

        def dual(x: float) -> PolicyObjective:
            return replace(asked, dual_clip=x)

        part = "bounds of the ratio"
        yield from _scan(observed, variants, "clip-range", part, above, high, words, ("above", 1 + asked.clip_high))
        yield from _scan(
            observed, variants, "clip-range", part, below, low, words, ("below", 1 - asked.clip_low), down=True
        )
        mirrored = np.unique(np.concatenate([above, 2 - below]))
        wide = ("on both sides, above", 1 + asked.clip_high)
        yield from _scan(observed, variants, "clip-range", part, mirrored, both, words, wide)
        own = "ratios of negative advantages act up to {} {}, where {:.4g} was asked for"
        yield from _scan(observed, variants, "clip-dual", "dual clip", above, dual, own, ("a bound", asked.dual_clip))
    if asked.correction == "mask":
        ratios = [correction_ratios(v.step, asked, trained_tokens(v.step, asked)) for v in variants]
        points = np.unique(np.concatenate(ratios))

        def cap(x: float) -> PolicyObjective:
            return replace(asked, correction_cap=x)

        def floor(x: float) -> PolicyObjective:
            return replace(asked, correction_floor=x)

        part = "bounds of the importance weights"
        words = "importance weights are masked {} {}, where {:.4g} was asked for"
        yield from _scan(
            observed, variants, "importance-bound", part, points, cap, words, ("above", asked.correction_cap)
        )
        yield from _scan(
            observed,
            variants,
            "importance-bound",
            part,
            points,
            floor,
            words,
            ("below", asked.correction_floor),
            down=True,
        )


def _scan(
    observed: Sequence[Observed],
    variants: Sequence[Variant],
    finding: str,
    part: str,
    points: np.ndarray,
    make: Callable[[float], PolicyObjective],
    words: str,
    said: tuple[str, float],
    down: bool = False,
) -> Iterator[Hypothesis]:
    """The bounds between two neighbouring points that fit, as one hypothesis.

    Args:
        down: the bound holds what lies below it, so one below all points holds nothing; otherwise one above them.
    """
    if not len(points):
        return
    points = points[::-1] if down else points
    middles = np.concatenate([(points[:-1] + points[1:]) / 2, [points[-1] * (1 / 1.5 if down else 1.5)]])
    fit = [i for i, x in enumerate(middles) if _worst_of(observed, variants, make(float(x))) <= 1]
    if not fit:
        return
    last = fit[-1] + 1
    where = f"beyond {points[fit[0]]:.4g} or not at all"
    if last < len(points):
        first, second = sorted((points[fit[0]], points[last]))
        where = f"somewhere between {first:.4g} and {second:.4g}"
    detail = words.format(said[0], where, said[1]).replace("where inf was", "where none was")
    chosen = make(float(middles[fit[len(fit) // 2]]))
    yield Hypothesis(finding, part, detail, lambda v: replace(v, asked=_moved(v.asked, variants[0].asked, chosen)))


def _lines(observed: Sequence[Observed], variants: Sequence[Variant], asked: PolicyObjective) -> Iterator[Hypothesis]:
    """Numbers on which the weights depend smoothly: looked for along a line."""
    if asked.scale != "none":
        detail = "{:.2g} is added to the deviation, where {:.2g} was asked for"
        yield from _line(
            observed, variants, ("advantage-deviation", "deviation"), np.logspace(-8, 0, 33),
            lambda x: replace(asked, eps=x), lambda x: detail.format(x, asked.eps),
        )  # fmt: skip
    if asked.kl and asked.kl_in == "reward":
        detail = "the coefficient of the KL in the reward is {:.4g}, where {:g} was asked for"
        yield from _line(
            observed, variants, ("kl-coefficient", "KL coefficient"), asked.kl * np.linspace(-3, 10, 53),
            lambda x: replace(asked, kl=x), lambda x: detail.format(x, asked.kl),
        )  # fmt: skip
    if asked.pull:
        detail = "the coefficient of the squared distance from log pi_old is {:.4g}, where {:g} was asked for"
        yield from _line(
            observed, variants, ("kl-coefficient", "squared distance from log pi_old"),
            asked.pull * np.linspace(-3, 10, 53), lambda x: replace(asked, pull=x),
            lambda x: detail.format(x, asked.pull),
        )  # fmt: skip
    if asked.correction == "truncate":
        ratios = np.concatenate([correction_ratios(v.step, asked, trained_tokens(v.step, asked)) for v in variants])
        detail = "importance weights are cut at {:.4g}, where {:.4g} was asked for"
        yield from _line(
            observed, variants, ("importance-bound", "bounds of the importance weights"), _spread(ratios),
            lambda x: replace(asked, correction_cap=x), lambda x: detail.format(x, asked.correction_cap),
        )  # fmt: skip
    if asked.surrogate == "weight" and asked.ratio != "none":
        ratios = np.concatenate([np.exp(log_ratios(v.step, asked, trained_tokens(v.step, asked))) for v in variants])
        detail = "the weight of the ratio is cut at {:.4g}, where {:.4g} was asked for"
        yield from _line(
            observed, variants, ("clip-range", "bounds of the ratio"), _spread(ratios),
            lambda x: replace(asked, clip_high=x - 1), lambda x: detail.format(x, 1 + asked.clip_high),
        )  # fmt: skip


def _spread(ratios: np.ndarray) -> np.ndarray:
    return np.unique(np.quantile(ratios, np.linspace(0, 1, FEW)))


def _line(
    observed: Sequence[Observed],
    variants: Sequence[Variant],
    name: tuple[str, str],
    grid: np.ndarray,
    make: Callable[[float], PolicyObjective],
    detail: Callable[[float], str],
) -> Iterator[Hypothesis]:
    """The best number on a line, first on a grid, then between the neighbours of its best point."""
    from scipy.optimize import minimize_scalar

    if len(grid) < 2:
        return
    found = [_worst_of(observed, variants, make(float(x))) for x in grid]
    best = int(np.argmin(found))
    if not math.isfinite(found[best]):
        return
    ends = (float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)]))
    fine = minimize_scalar(
        lambda x: _worst_of(observed, variants, make(float(x))), bounds=ends, method="bounded", options={"xatol": 1e-9}
    )
    number = float(fine.x) if fine.fun < found[best] else float(grid[best])
    chosen, first = make(number), variants[0].asked
    yield Hypothesis(*name, detail(number), lambda v: replace(v, asked=_moved(v.asked, first, chosen)))


def _moved(own: PolicyObjective, before: PolicyObjective, after: PolicyObjective) -> PolicyObjective:
    """An objective with the settings that differ between two others."""
    names = [n for n in before.__dataclass_fields__ if getattr(before, n) != getattr(after, n)]
    return replace(own, **{name: getattr(after, name) for name in names})


def _worst_of(observed: Sequence[Observed], variants: Sequence[Variant], asked: PolicyObjective) -> float:
    return worst(observed, [replace(v, asked=asked) for v in variants])
