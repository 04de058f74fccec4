"""What a comparison found, in a sentence that claims no more than its intervals do."""

from __future__ import annotations

from collections.abc import Sequence

from thence.compare.result import ALL_BASES
from thence.compare.statistics import Statistics
from thence.pages.comparison.decided import decided_text
from thence.pages.comparison.words import column_label, embedded, label, names, seeds_text


def outcome(statistics: Statistics) -> str:
    """Which arms differ significantly from the reference in the headline column, and which do not."""
    comparison = statistics.comparison
    reference = label(comparison.arm(comparison.reference))
    column = comparison.columns[0]
    if comparison.is_sealed:
        return f"{decided_text(statistics)} Differences are shown when all runs are finished: the design is registered."
    parts = [part for base in _bases(statistics) if (part := _on(statistics, base))]
    if not parts:
        return f"No arm can be compared with {reference} yet."
    world = " Findings about the embedded world, a small synthetic task." if embedded(comparison) else ""
    so_far = "So far, compared" if comparison.pending else "Compared"
    head = f"{so_far} with {reference} on {column_label(column)} ({seeds_text(statistics)})"
    decided = decided_text(statistics)
    return f"{decided}{' ' if decided else ''}{head}: {', and '.join(parts)}.{world}"


def _on(statistics: Statistics, base: str) -> str:
    comparison = statistics.comparison
    higher, lower, undecided = [], [], []
    for arm in comparison.arms:
        difference = statistics.differences.get((arm.name, base, comparison.columns[0]))
        if difference is not None:
            kept = undecided if not difference.significant else higher if difference.mean > 0 else lower
            kept.append((difference.mean, label(arm)))
    if not higher + lower + undecided:
        return ""
    said = [
        _counted(higher, "significantly higher"),
        _counted(lower, "significantly lower", most=4),
        _counted(undecided, "not told apart from it"),
    ]
    return ", ".join(said) if base == ALL_BASES else f"on {base}, {', '.join(said)}"


def _bases(statistics: Statistics) -> Sequence[str]:
    comparison = statistics.comparison
    return [ALL_BASES] if comparison.is_pooled else comparison.bases


def _counted(arms: list[tuple[float, str]], words: str, most: int = 1000) -> str:
    """How many arms, and the best of them by name where there are not more than ``most``."""
    listed = f" ({names([name for _, name in sorted(arms, reverse=True)])})" if 0 < len(arms) <= most else ""
    return f"{len(arms) or 'none'} {words}{listed}"
