"""Parameters that have a gradient and never moved: a fit over the others would pass them over."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from thence.audit.result import Finding
from thence.audit.solve.recover import spacing_of
from thence.audit.solve.signs import looks_like_signs, step_size

STILL = 0.3
"""Under Adam a coordinate that moved less than this share of the step had no gradient: weight decay moves it less."""
SEEN = 0.05
"""Coordinates with a smaller expected gradient than this share of their tensor's root mean square are not looked at."""
FLAT = 1e-5
"""Tensors with a smaller expected gradient than this share of the whole one have none: biases of keys, for example."""
WHOLE, PART = 0.98, 0.05
"""Shares of a tensor's coordinates: from the first on all of it is untouched, from the second on a part."""
LINEAR = 1e-3
"""Without Adam a tensor that moved less than this share of what was due is untouched."""
ALONG = 0.9
"""An update with a smaller cosine to the expected gradient is no multiple of it: it says not what move was due."""
RESOLVED = 20.0
"""The move that was due must be so many times the spacing of the stored numbers, or nothing can be said."""


def not_finite(state: Mapping[str, Tensor]) -> str:
    """What of a state is NaN or infinite, in words; empty: nothing."""
    counts = {name: int((~value.isfinite()).sum()) for name, value in state.items()}
    bad = {name: count for name, count in counts.items() if count}
    if not bad:
        return ""
    return f"{sum(bad.values())} values in {len(bad)} of {len(state)} tensors are not finite: {groups(tuple(bad))}"


@dataclass(frozen=True)
class Untouched:
    """Names of tensors that did not move, and shares of those that moved in part."""

    whole: tuple[str, ...]
    parts: Mapping[str, float]
    tensors: int


def find_untouched(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], expected: Mapping[str, Tensor], bits: int
) -> Untouched:
    """Which tensors have an expected gradient and did not move.

    Args:
        before, after: parameters around the step, by name.
        expected: gradient under the objective asked for, float64, by name; other parameters are not looked at.
        bits: mantissa of the stored parameters.
    """
    names = [name for name in expected if name in before and name in after]
    flat = {n: expected[n].reshape(-1).numpy() for n in names}
    old = {n: before[n].double().reshape(-1).numpy() for n in names}
    change = {n: old[n] - after[n].double().reshape(-1).numpy() for n in names}
    if not names:
        return Untouched((), {}, 0)
    together, spacing = (np.concatenate([values[n] for n in names]) for values in (change, _spacings(old, bits)))
    total = np.sqrt(np.mean(np.concatenate([flat[n] for n in names]) ** 2))
    signs = looks_like_signs(together, spacing)
    size = step_size(together, spacing) if signs else _factor(change, flat)
    typical = 0.0 if signs or _along(change, flat) > ALONG else float(np.sqrt(np.mean(together**2)))
    whole, parts = [], {}
    for name in names:
        seen = np.abs(flat[name]) > SEEN * np.sqrt(np.mean(flat[name] ** 2))
        if signs:  # a step that is smaller than the spacing of the stored numbers need not show
            seen &= spacing_of(old[name], bits) <= size
        if np.sqrt(np.mean(flat[name] ** 2)) <= FLAT * total or not seen.any():
            continue
        if signs:
            share = float((np.abs(change[name][seen]) < STILL * size).mean())
        else:
            due = size * flat[name][seen]
            due = due if not typical else typical * due / np.sqrt(np.mean(due**2))
            share = _share(change[name][seen], due, old[name][seen], bits, LINEAR if not typical else 0.0)
        if share >= WHOLE:
            whole.append(name)
        elif share >= PART:
            parts[name] = share
    return Untouched(tuple(whole), parts, len(names))


def untouched_finding(found: Untouched) -> Finding:
    """The tensors that never moved, by group: names that differ in their layer alone are one."""
    detail = f"{len(found.whole)} of {found.tensors} parameters never moved: {groups(found.whole)}"
    return Finding("parameters-untouched", "fault", detail)


def partly_finding(found: Untouched) -> Finding:
    """The tensors of which a part never moved."""
    most = max(found.parts.values())
    detail = f"up to {most:.0%} of {len(found.parts)} of {found.tensors} parameters never moved: "
    return Finding("parameters-untouched", "fault", detail + groups(list(found.parts)))


def groups(names: Sequence[str]) -> str:
    """Names of parameters in words, those of all layers together."""
    counted: dict[str, int] = {}
    for name in names:
        key = re.sub(r"\.\d+\.", ".*.", name)
        counted[key] = counted.get(key, 0) + 1
    said = [key if count == 1 and "*" not in key else f"{key} ({count})" for key, count in counted.items()]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} other kinds" if len(said) > 4 else "")


def _factor(change: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """What the expected gradient is multiplied by in the update, from the tensors that moved."""
    moved = [n for n in change if np.any(change[n])]
    product = sum(float(change[n] @ expected[n]) for n in moved)
    size = sum(float(expected[n] @ expected[n]) for n in moved)
    return product / size if size else 0.0


def _spacings(old: Mapping[str, np.ndarray], bits: int) -> dict[str, np.ndarray]:
    return {name: spacing_of(values, bits) for name, values in old.items()}


def _along(change: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """Cosine of the update and the expected gradient, over the tensors that moved."""
    moved = [n for n in change if np.any(change[n])]
    sizes = [np.sqrt(sum(float(values[n] @ values[n]) for n in moved)) for values in (change, expected)]
    product = abs(sum(float(change[n] @ expected[n]) for n in moved))
    return product / (sizes[0] * sizes[1]) if sizes[0] and sizes[1] else 1.0


def _share(change: np.ndarray, due: np.ndarray, old: np.ndarray, bits: int, linear: float) -> float:
    """Share of a tensor that did not move where it was due to: all of it or nothing; the fit sees parts by itself.

    Args:
        linear: a move below that share of the one due is none.
    """
    spacing = spacing_of(old, bits)
    if np.linalg.norm(due) <= RESOLVED * np.linalg.norm(spacing):
        return 0.0
    # Steps of one size and sign move a tensor of equal numbers as decay would: only a known due tells them apart.
    if len(old) >= 8 and old @ old and (linear or np.ptp(old)):
        change = change - old * (change @ old) / (old @ old)  # weight decay moves it without a gradient
    return float(np.linalg.norm(change) < linear * np.linalg.norm(due) + np.linalg.norm(spacing))
