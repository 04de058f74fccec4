"""Does the update depend on how the rows are cut? Told from updates alone: no model, no gradients, no weights.

The thresholds lie between what clean steps and what bugs do, measured by benchmarks/audit_cuts.py on ten model families
and nine optimizers: at most 0.09% of the signs (0.18% in bfloat16) or 5.2% of the norm (in bfloat16), against at least
4% of the signs or 7.3% of the norm. In bfloat16 the norm misses some bugs: 2 of 314.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from thence.audit.result import Case, CaseResult, CutComparison, Finding
from thence.audit.solve.recover import spacing_of
from thence.audit.solve.signs import SHORT, looks_like_signs, step_size

CUT_FREE = ("token-mean", "sequence-mean", "constant-divisor")
"""Objectives whose gradient is the same however the rows of a step are cut."""
TURNED = {"float32": 5e-3, "bfloat16": 1e-2, "autocast": 1e-2}
"""Share of signs that arithmetic alone may turn between two cuts, by precision."""
APART = {"float32": 2e-2, "bfloat16": 0.15, "autocast": 0.15}
"""Norm of the difference of two updates over the norm of one that arithmetic alone may cause, by precision."""
NOISE = 6.0
"""Rounding of the stored parameters may part two updates by so many times its own share."""


@dataclass(frozen=True)
class FirstUpdate:
    """What the first optimizer step of a case did.

    Args:
        examples: of the step, sorted; one that appears twice stands twice.
        change: before minus after of every parameter, by name, each flat, float32.
        noise: share of the change that rounding of the stored parameters may be.
        precision: of the case as it ran.
        signs: whether the moves are all of one size, as they could be stored; None: judged by the moves alone.
        gradient: what the optimizer was given, by name; None: nobody saw it.
        start: digest of the parameters before the step.
    """

    examples: tuple[int, ...]
    change: Mapping[str, np.ndarray]
    noise: float
    precision: str
    signs: bool | None = None
    gradient: Mapping[str, np.ndarray] | None = None
    start: str = ""

    def of_signs(self, names: Sequence[str]) -> bool:
        """Whether these parameters moved by one and the same amount."""
        return looks_like_signs(_joined(self.change, names)) if self.signs is None else self.signs


def first_update(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    examples: Sequence[int],
    noise: float,
    precision: str,
    bits: int = 23,
    gradient: Mapping[str, Tensor] | None = None,
) -> FirstUpdate:
    """The change of every parameter that both snapshots hold.

    Args:
        bits: mantissa of the stored parameters.
        Others: see :class:`FirstUpdate`.
    """
    names = [name for name in before if name in after and before[name].shape == after[name].shape]
    change = {name: (before[name].double() - after[name].double()).reshape(-1).float().numpy() for name in names}
    spacing = np.concatenate([spacing_of(after[name].double().reshape(-1).numpy(), bits) for name in names])
    own = None if gradient is None else {n: g.reshape(-1).float().numpy() for n, g in gradient.items()}
    signs = looks_like_signs(_joined(change, names), spacing)
    return FirstUpdate(tuple(sorted(examples)), change, noise, precision, signs, own, _digest(before))


def _digest(state: Mapping[str, Tensor]) -> str:
    """Equal for equal parameters: adapters that every run draws anew begin somewhere else."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode() + state[name].detach().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def compare_cuts(results: Sequence[CaseResult], updates: Mapping[str, FirstUpdate]) -> list[CaseResult]:
    """The results, each compared with a case that trains the same rows in another cut, where there is one.

    The reference is a case whose weights are all as asked, of several the one with fewest micro-batches. Without one
    nothing is compared: dropout, or an optimizer that nobody can see through, would look like a cut.

    Args:
        updates: by name of the case.
    """
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        if result.case.asked in CUT_FREE and result.case.name in updates:
            groups.setdefault(_key(result.case, updates[result.case.name]), []).append(result)
    compared: dict[str, CaseResult] = {}
    for members in groups.values():
        sound = [r for r in members if r.status == "judged" and r.steps and not r.faults]
        if not sound:
            continue
        reference = min(sound, key=lambda r: (r.case.accumulation * r.case.ranks, r.case.name))
        for result in members:
            if result is not reference and not result.faults:
                compared[result.case.name] = _compared(result, reference.case.name, updates)
    return [compared.get(result.case.name, result) for result in results]


def difference(reference: FirstUpdate, other: FirstUpdate, name: str = "") -> CutComparison:
    """How far two updates of the same rows lie apart.

    Args:
        name: of the reference's case.
    """
    seen = reference.gradient is not None and other.gradient is not None
    first, second = (u.gradient if seen and u.gradient is not None else u.change for u in (reference, other))
    names = [n for n in first if n in second]
    a, b = _joined(first, names), _joined(second, names)
    if not seen and reference.of_signs(names) and other.of_signs(names):
        both = (np.abs(a) > SHORT * step_size(a)) & (np.abs(b) > SHORT * step_size(b))
        share = float((np.sign(a[both]) != np.sign(b[both])).mean()) if both.any() else 1.0
        return CutComparison(name, "signs", share, max(TURNED[reference.precision], TURNED[other.precision]))
    size = float(np.linalg.norm(a))
    share = float(np.linalg.norm(a - b)) / size if size else float(np.any(b))
    allowed = max(APART[reference.precision], APART[other.precision])
    if not seen:
        allowed = max(allowed, NOISE * max(reference.noise, other.noise))
    return CutComparison(name, "norm", share, allowed)


def _joined(values: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([values[name] for name in names]) if names else np.zeros(0, np.float32)


def _key(case: Case, update: FirstUpdate) -> str:
    """Cases with the same key begin alike and differ in their cut alone (recomputing activations changes nothing)."""
    facts = (
        case.asked, update.examples, case.optimizer, case.lr, case.eps, case.clip, case.precision, case.packing,
        case.label_smoothing, sorted(case.options.items()), update.start,
    )  # fmt: skip
    return json.dumps(facts, default=str)


def _compared(result: CaseResult, reference: str, updates: Mapping[str, FirstUpdate]) -> CaseResult:
    found = difference(updates[reference], updates[result.case.name], reference)
    result = replace(result, cut=found)
    if found.share <= found.allowed:
        return result
    what = (
        f"{found.share:.1%} of the update's signs are others than"
        if found.measure == "signs"
        else f"the update differs by {found.share:.2g} of its size from that"
    )
    detail = f"{what} in '{reference}', which trains the same rows in another cut"
    return replace(result, findings=(*result.findings, Finding("depends-on-cut", "fault", detail)))
