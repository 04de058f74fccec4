"""The numbers of a comparison as JSON and CSV. Shares are between 0 and 1."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from thence.compare.result import Column, Run
from thence.compare.sections import sections_of
from thence.compare.statistics import Statistics
from thence.files import to_csv, to_json
from thence.pages.comparison.decided import decided_json
from thence.pages.comparison.outcome import outcome
from thence.pages.comparison.words import mean_spent, notes

_RUN = ("arm", "title", "base", "seed", "split", "temperature", "problems", "samples", "accuracy")
_RUN += ("mean_tokens", "truncated", "unknown", "steps", "trained_tokens", "generated_tokens")
_RUN += ("rule_flops", "executed_flops", "seconds", "settings", "folder")
_SUMMARY = ("arm", "title", "group", "method", "fault", "reconstruction", "base", "split", "temperature", "seeds")
_SUMMARY += ("problems", "samples", "mean", "std", "low", "high", "interval_over", "reference", "difference")
_SUMMARY += ("difference_low", "difference_high", "p", "p_corrected", "significant", "paired_seeds")
_SUMMARY += ("steps", "trained_tokens", "generated_tokens", "rule_flops", "executed_flops", "seconds")


def runs_csv(statistics: Statistics) -> str:
    """One line a run and column; cost is of the whole way from the base."""
    comparison = statistics.comparison
    titles = {arm.name: arm.title for arm in comparison.arms}
    rows = []
    for run in comparison.runs:
        about = {"arm": run.arm, "title": titles.get(run.arm, ""), "base": run.base, "seed": run.seed}
        about |= {"settings": to_json(dict(run.settings)), "folder": run.folder, **asdict(run.spent)}
        rows += [about | _measured(run, column) for column in comparison.columns if run.on(column)]
    return to_csv(_RUN, rows)


def _measured(run: Run, column: Column) -> dict[str, Any]:
    measured = run.on(column)
    assert measured is not None
    return {
        "split": column.split,
        "temperature": column.temperature,
        "problems": len(measured.right),
        "samples": measured.samples,
        "accuracy": measured.accuracy,
        "mean_tokens": measured.mean_tokens,
        "truncated": measured.truncated,
        "unknown": measured.unknown,
    }


def summary_csv(statistics: Statistics) -> str:
    """One line an arm, base and column: estimate, paired difference to the reference, and mean cost.

    With many bases there are also lines over all of them, with :data:`~thence.compare.result.ALL_BASES` for the base
    and the number of blocks for that of seeds.
    """
    return to_csv(_SUMMARY, summary_rows(statistics))


def summary_rows(statistics: Statistics) -> list[dict[str, Any]]:
    """The lines of :func:`summary_csv`."""
    comparison = statistics.comparison
    rows = []
    for (name, base, column), estimate in statistics.estimates.items():
        arm, difference = comparison.arm(name), statistics.differences.get((name, base, column))
        row: dict[str, Any] = {
            "arm": name,
            "title": arm.title,
            "group": arm.group,
            "method": arm.method,
            "fault": " ".join(arm.fault),
            "reconstruction": arm.reconstruction,
            "base": base,
            "split": column.split,
            "temperature": column.temperature,
            "reference": comparison.reference,
            "interval_over": estimate.over,
        }
        row |= {key: value for key, value in asdict(estimate).items() if key != "over"}
        if difference is not None:
            row |= {
                "difference": difference.mean,
                "difference_low": difference.low,
                "difference_high": difference.high,
                "p": difference.p,
                "p_corrected": difference.corrected,
                "significant": difference.significant,
                "paired_seeds": difference.seeds,
            }
        rows.append(row | mean_spent(comparison.runs_of(name, base)))
    return rows


def report_json(statistics: Statistics) -> str:
    """Outcome, notes, every estimate and difference, failures and what was tried."""
    comparison = statistics.comparison
    content = {
        "name": comparison.name,
        "outcome": outcome(statistics),
        "notes": notes(statistics),
        "reference": comparison.reference,
        "budget": comparison.budget,
        "seeds": comparison.seeds,
        "base_seeds": {base: comparison.seeds_of(base) for base in comparison.bases},
        "registration": None if comparison.registration is None else asdict(comparison.registration),
        "replicates": statistics.replicates,
        "pending": comparison.pending,
        "results": [{key: row.get(key) for key in _SUMMARY} for row in summary_rows(statistics)],
        "tries": [asdict(t) for t in comparison.tries],
        "failures": [asdict(f) for f in comparison.failures],
        "environment": dict(comparison.environment),
        **decided_json(statistics, sections_of(comparison)),
    }
    return to_json(content, indent=1) + "\n"
