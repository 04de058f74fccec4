"""How numbers, arms and settings of a comparison are said, and the notes that stand under its tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from thence.compare.result import ALL_BASES, Arm, Column, Comparison, Run, Spent
from thence.compare.statistics import LEVEL, Difference, Estimate, Statistics
from thence.foreign_text import visible

STAR = "*"
_SLACK = 0.05
_UNITS: Mapping[str, Callable[[Spent], float]] = {
    "FLOPs": lambda spent: spent.rule_flops,
    "trained tokens": lambda spent: spent.trained_tokens,
    "steps": lambda spent: spent.steps,
}


def label(arm: Arm) -> str:
    """What tables call an arm; a method whose source leaves something open says so wherever it stands."""
    said = visible(arm.title or arm.name)
    return f"{said} (reconstruction)" if arm.reconstruction else said


def column_label(column: Column) -> str:
    """A test set and its temperature."""
    return f"{column.split}, T = {column.temperature:g}"


def score(estimate: Estimate | None) -> str:
    """Mean and standard deviation in per cent."""
    if estimate is None:
        return "–"
    text = f"{100 * estimate.mean:.1f}"
    return text if estimate.std is None else f"{text} ± {100 * estimate.std:.1f}"


def points(difference: Difference | None) -> str:
    """A difference in percentage points, its interval, and a star where it is significant."""
    if difference is None:
        return "–"
    low, high = signed(difference.low), signed(difference.high)
    return f"{signed(difference.mean)} [{low}, {high}]{STAR if difference.significant else ''}"


def signed(share: float) -> str:
    """A difference of shares in points, with its sign."""
    text = f"{100 * share:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{key} = {value:g}" if _number(value) else f"{key} = {value}" for key, value in settings.items())


def settings_of(runs: list[Run]) -> str:
    """The settings of an arm's runs, which tuning chose once for all seeds."""
    return " / ".join(dict.fromkeys(settings_text(run.settings) for run in runs)) or "–"


def mean_spent(runs: list[Run]) -> dict[str, float | None]:
    """Mean over seeds of every quantity of :class:`~thence.compare.result.Spent`; None where one is not known."""
    names = list(Spent.__dataclass_fields__)
    values = {name: [getattr(run.spent, name) for run in runs] for name in names}
    return {name: None if not runs or None in of else sum(of) / len(of) for name, of in values.items()}


def amount(value: float | None) -> str:
    """A count in at most four characters and a letter, for example ``43.3k``."""
    if value is None:
        return "–"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}"


def flops_text(value: float | None) -> str:
    """FLOPs with three digits, for example ``1.05e12``."""
    return "–" if value is None else f"{value:.2e}".replace("e+", "e") if value else "0"


def names(arms: list[str], most: int = 3) -> str:
    """Some names, and how many more; semicolons between them, for a title may hold commas."""
    if len(arms) <= most + 1:
        return "; ".join(arms)
    return f"{'; '.join(arms[:most])}; and {len(arms) - most} others"


def embedded(comparison: Comparison) -> bool:
    """Whether a base comes from the embedded world: by its name, or by ``environment["bases"]``, name to path."""
    paths = comparison.environment.get("bases")
    origins = list(paths.values()) if isinstance(paths, Mapping) else []
    return any(str(origin).startswith("world:") for origin in [*comparison.bases, *origins])


def seeds_text(statistics: Statistics) -> str:
    """How many seeds and problems the headline has."""
    comparison = statistics.comparison
    pooled = comparison.is_pooled
    found = [
        estimate
        for (_, base, column), estimate in statistics.estimates.items()
        if column == comparison.columns[0] and (base == ALL_BASES) == pooled
    ]
    if not found:
        return "nothing measured yet"
    seeds = sorted({e.seeds for e in found})
    problems = sorted({e.problems for e in found})
    samples = sorted({e.samples for e in found})
    span = unit(ALL_BASES if pooled else "") if seeds != [1] else "block" if pooled else "seed"
    return f"{_range(seeds)} {span}, {_range(problems)} problems × {_range(samples)} samples"


def notes(statistics: Statistics) -> list[str]:
    """What a reader has to know before any table: what is missing, failed, off budget, or measured once."""
    comparison = statistics.comparison
    found = amendment_notes(comparison)
    if comparison.pending:
        runs = "run is" if comparison.pending == 1 else "runs are"
        sealed = " No difference is shown before: the design is registered." if comparison.is_sealed else ""
        found.append(f"Unfinished: {comparison.pending} {runs} still to come. Numbers will move.{sealed}")
    if comparison.failures:
        failed = sorted({label(comparison.arm(f.arm)) for f in comparison.failures})
        runs = "run failed and is" if len(comparison.failures) == 1 else "runs failed and are"
        found.append(f"{len(comparison.failures)} {runs} missing everywhere: {names(failed)}.")
    found += budget_notes(comparison)
    if comparison.is_pooled:
        found.append(
            f"Means, intervals and differences are over {len(comparison.blocks)} blocks, each one base with "
            "one seed. Their spread is that of bases and seeds together."
        )
    elif any(e.seeds == 1 for e in statistics.estimates.values()):
        found.append(
            "What has a single seed has an interval over problems only, which says nothing about other seeds; "
            "no difference is called significant there."
        )
    return found


def registered_text(comparison: Comparison) -> str:
    """When the design was registered, and its hash; empty: it was not."""
    kept = comparison.registration
    if kept is None:
        return ""
    changed = f", amended {len(kept.amendments)} times" if len(kept.amendments) > 1 else ", amended once"
    at = f" at commit {kept.commit[:12]}" if kept.commit else ""
    return (
        f"design registered {kept.time}{at}, before the first reported run: sha256 {kept.sha256}"
        f"{changed if kept.amendments else ''}"
    )


def amendment_notes(comparison: Comparison) -> list[str]:
    """What was changed of a registered design, when, why, and how many reported runs there were by then."""
    found = []
    for amendment in comparison.registration.amendments if comparison.registration else ():
        changes = "; ".join(map(str, amendment.changes))
        runs = "1 reported run" if amendment.finished == 1 else f"{amendment.finished} reported runs"
        found.append(
            f"The registered design was amended {amendment.time}, after {runs}: {visible(amendment.reason)} "
            f"({visible(changes)})"
        )
    return found


def unit(base: str) -> str:
    """What runs of an arm differ in, on a base or on all of them."""
    return "blocks" if base == ALL_BASES else "seeds"


def base_title(statistics: Statistics, base: str) -> str:
    """The heading of what is shown of a base, or of all of them."""
    planned = len(statistics.comparison.blocks)
    whole = (
        f"Mean over the blocks so far, of {planned}" if statistics.comparison.pending else f"Mean over {planned} blocks"
    )
    return whole if base == ALL_BASES else base


def table_note(statistics: Statistics, base: str) -> str:
    """How to read scores, differences and stars."""
    comparison = statistics.comparison
    reference = label(comparison.arm(comparison.reference))
    return (
        f"Accuracy in per cent, mean ± standard deviation over {unit(base)}. Second line: difference to {reference} "
        f"in points on the same {unit(base)} and problems, with its 95% interval over problems and {unit(base)} (not "
        f"corrected). {STAR} and bold: significant, p < {LEVEL:g} after Holm's correction for "
        f"{len(comparison.arms) - 1} arms."
    )


def budget_notes(comparison: Comparison) -> list[str]:
    """Which arms stayed under or went over the budget by more than 5%, the way from the base counted."""
    said = re.match(rf"([\d.e]+) ({'|'.join(_UNITS)})$", comparison.budget)
    if said is None:
        return []
    limit, unit = float(said[1]), said[2]
    under: dict[str, float] = {}
    over: dict[str, float] = {}
    for arm in comparison.arms:
        for base in comparison.bases:
            runs = comparison.runs_of(arm.name, base) if arm.kind else []
            if not runs:
                continue
            share = sum(_UNITS[unit](run.spent) for run in runs) / len(runs) / limit
            kept, better = (under, min) if share < 1 else (over, max)
            if abs(share - 1) > _SLACK:
                kept[label(arm)] = better(kept.get(label(arm), share), share)
    found = []
    for kept, words in ((under, "did not reach the budget"), (over, "went over the budget")):
        if kept:
            listed = "; ".join(f"{name} ({share:.0%})" for name, share in kept.items())
            found.append(f"By more than {_SLACK:.0%} {words} of {comparison.budget}: {listed}.")
    return found


def _range(values: list[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
