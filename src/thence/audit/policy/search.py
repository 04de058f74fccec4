"""Which change of what was asked for explains all steps of a case: every single one, then pairs; none is guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from thence.audit.policy.change import Hypothesis
from thence.audit.policy.hypotheses import hypotheses
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Observed, Variant, worst
from thence.audit.policy.outside import outside_changes
from thence.audit.policy.predict import row_advantages
from thence.audit.policy.solved import beside, coefficients, scaled, solved

MOST = 4
"""Further explanations that are listed."""


@dataclass(frozen=True)
class Explained:
    """What a search found.

    Args:
        clean: whether every step is as asked.
        found: one hypothesis, or two that are true together; empty: as asked, or nothing fits.
        others: in words, what fits all steps as well.
        open: part -> change of it that would fit all steps as well, of a case as asked.
        tried: the parts of which a change was tried.
        faulty: indices of the steps that are not as asked.
    """

    clean: bool
    found: tuple[Hypothesis, ...] = ()
    others: tuple[str, ...] = ()
    open: Mapping[str, str] = field(default_factory=dict)
    tried: tuple[str, ...] = ()
    faulty: tuple[int, ...] = ()


def search(observed: Sequence[Observed], asked: PolicyObjective, spanned: bool) -> Explained:
    """Explain the steps of a case.

    Args:
        spanned: whether weights of tokens alone, at the temperature asked for, explain every step.
    """
    base = [Variant(o.step, asked) for o in observed]
    faulty = tuple(o.index for o, v in zip(observed, base, strict=True) if not o.fits(v))
    steps = [o.step for o in observed]
    plain = hypotheses(steps, asked)
    if not faulty:
        fit = _fitting(observed, base, plain)
        tried = tuple(dict.fromkeys(h.part for h in plain if h.part))
        return Explained(True, open={h.part: h.detail for h in reversed(fit) if h.part}, tried=tried)

    def stages() -> Iterator[list[Hypothesis]]:
        yield _fitting(observed, base, plain)
        yield _fitting(observed, base, solved(observed, base))
        if not spanned:
            yield from _padded(observed, asked)
            yield _fitting(observed, base, list(beside(observed, base)))
            yield from _leaked(observed, base)
            yield list(temperatures(observed, base))

    for fit in stages():
        if fit:
            others = tuple(h.detail for h in fit[1:] if h.detail != fit[0].detail)
            return Explained(False, (fit[0],), others[:MOST], faulty=faulty)
    if spanned:
        for pair in (_pairs(observed, base, plain), _single_rows(observed, base)):
            if pair:
                return Explained(False, pair[0], faulty=faulty)
        if len(faulty) < len(observed):
            # What goes wrong in some steps alone: the others are as asked.
            some = [o for o in observed if o.index in faulty]
            found = search(some, asked, spanned)
            return replace(found, faulty=faulty)
    return Explained(False, faulty=faulty)


def _fitting(observed: Sequence[Observed], base: Sequence[Variant], tried: Sequence[Hypothesis]) -> list[Hypothesis]:
    return [h for h in tried if worst(observed, [h.change(v) for v in base]) <= 1]


def _padded(observed: Sequence[Observed], asked: PolicyObjective) -> Iterator[list[Hypothesis]]:
    """Padding as targets of the steps that have some, masked from attention or not."""
    made = [o.padded() for o in observed]
    for kind in range(max(map(len, made), default=0)):
        padded = [own[kind] if own else o for o, own in zip(observed, made, strict=True)]
        tried = list(outside_changes([o.step for o in padded], asked, ("padding",)))
        yield _fitting(padded, [Variant(o.step, asked) for o in padded], tried)


def _leaked(observed: Sequence[Observed], base: Sequence[Variant]) -> Iterator[list[Hypothesis]]:
    """The gradients of earlier steps beside what was asked for."""
    leaky = [replace(o, system=o.leaked()) if o.leaked is not None else o for o in observed]
    detail = "gradients of earlier steps are applied again (gradients not cleared, or momentum)"
    leak = Hypothesis("leak", "gradients of earlier steps", detail, lambda v: v)
    yield [leak] if worst(leaky, base) <= 1 else []


def _pairs(
    observed: Sequence[Observed], base: Sequence[Variant], plain: Sequence[Hypothesis]
) -> list[tuple[Hypothesis, ...]]:
    """Two changes at once; the first of several that are the same here stands for all."""
    distinct: list[tuple[Hypothesis, np.ndarray]] = []
    reference = np.concatenate([v.weights() for v in base])
    for hypothesis in plain:
        weights = np.concatenate([np.nan_to_num(hypothesis.change(v).weights()) for v in base])
        if all(not np.allclose(weights, w, rtol=1e-9, atol=1e-15) for w in (reference, *(w for _, w in distinct))):
            distinct.append((hypothesis, weights))
    kept = [h for h, _ in distinct]
    # The step that is farthest from what was asked decides first: most pairs fail there.
    first = int(np.argmax([o.distance(v).share for o, v in zip(observed, base, strict=True)]))
    for number, one in enumerate(kept):
        changed = [one.change(v) for v in base]
        for two in kept[number + 1 :]:
            if two.part == one.part or not observed[first].fits(two.change(changed[first])):
                continue
            if worst(observed, [two.change(v) for v in changed]) <= 1:
                return [(one, two)]
        for two in (*scaled(observed, changed), *coefficients(observed, changed)):
            if two.part != one.part and worst(observed, [two.change(v) for v in changed]) <= 1:
                return [(one, two)]
    return []


def _single_rows(observed: Sequence[Observed], base: Sequence[Variant]) -> list[tuple[Hypothesis, ...]]:
    """Rows with any advantages, if within each row all is as asked."""
    found: list[np.ndarray] = []
    for o, v in zip(observed, base, strict=True):
        own = row_advantages(v.step, v.asked)
        if o.system.signs or v.asked.kl or not own.any():
            return []
        solved_for = _advantages(o, v, own)
        if solved_for is None or not o.fits(replace(v, other=replace(v.other, advantage=solved_for))):
            return []
        found.append(solved_for)
    own = row_advantages(base[0].step, base[0].asked)
    said = ", ".join(f"{a:.3g}" for a in found[0][:8])
    asked = ", ".join(f"{a:.3g}" for a in own[:8])
    detail = f"the advantages of the rows are {said}, where {asked} were asked for"
    by_step = {id(v.step): a for v, a in zip(base, found, strict=True)}

    def change(variant: Variant) -> Variant:
        return replace(variant, other=replace(variant.other, advantage=by_step[id(variant.step)]))

    return [(Hypothesis("advantage", "baseline", detail, change),)]


def _advantages(observed: Observed, variant: Variant, own: np.ndarray) -> np.ndarray | None:
    """Advantages, one a row, that bring the prediction nearest; their signs decide what is clipped, so twice."""
    system = observed.system
    signs = np.sign(own) + (own == 0)
    result = None
    for _ in range(3):
        unit = replace(variant, other=replace(variant.other, advantage=signs)).weights()
        rows = np.stack([system.spread(np.where(variant.step.row == i, unit * signs[i], 0.0)) for i in range(len(own))])
        result = system.solve(rows)
        if (np.sign(result) + (result == 0) == signs).all():
            break
        signs = np.sign(result) + (result == 0)
    return result


def temperatures(observed: Sequence[Observed], base: Sequence[Variant]) -> Iterator[Hypothesis]:
    """Another temperature, in all log-probabilities or in the current ones alone."""
    from scipy.optimize import minimize_scalar

    asked = base[0].asked.temperature

    def far(temperature: float, alone: bool, steps: Sequence[Observed]) -> float:
        most = 0.0
        for o in steps:
            step, distance = o.at_temperature(temperature)
            if alone:
                step = replace(step, old=o.step.old, reference=o.step.reference, sampler=o.step.sampler)
            variant = Variant(step, base[0].asked)
            most = max(most, distance(variant.weights()).share / o.system.tolerance)
        return most

    known = {1.0: "ignored", asked**2: "applied twice", 1 / asked: "inverted"}
    words = "; the temperature is {}" if asked != 1 else "{}"
    for alone, where in ((False, "in all log-probabilities"), (True, "in those of the current policy alone")):
        best: Callable[[float], float] = lambda t, a=alone: far(float(np.exp(t)), a, observed[:1])  # noqa: E731
        numbers = [t for t in known if t != asked]
        hit = [t for t in numbers if far(t, alone, observed) <= 1]
        if not hit:
            found = minimize_scalar(best, bounds=(-1.5, 1.5), method="bounded", options={"xatol": 1e-7})
            number = float(np.exp(found.x))
            hit = [number] if found.fun <= 1 and far(number, alone, observed) <= 1 else []
        for number in hit:
            how = words.format(known[number]) if asked != 1 and number in known else ""
            detail = f"logits are divided by {number:.4g} {where}, where {asked:g} was asked for{how}"
            yield Hypothesis("temperature", "temperature", detail, lambda v: v)
            return
