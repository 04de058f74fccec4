"""Which rows of the sources are used, how often and in which order: weights, pass rates, a curriculum."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from thence.data.example import Example
from thence.errors import DataError

PASS_RATE = "pass_rate"
"""The column that says which share of a model's responses to a row is right."""


def mixed(parts: Sequence[Sequence[Example]], weights: Sequence[float], limit: int | None) -> list[Example]:
    """The sources' rows in the proportion of their weights, source by source.

    Rows are repeated from the start where a source has too few. Without a limit every row of every source is used at
    least once, so the source that is largest for its weight is used exactly once.

    Args:
        parts: the rows of each source.
        weights: one a source, above 0.
        limit: rows in all.

    Raises:
        DataError: not one weight a source.
    """
    if len(weights) != len(parts):
        raise DataError(
            f"{len(weights)} weights for {len(parts)} sources",
            remedy="give one weight for each entry of data.source",
            field="data.weights",
        )
    total = math.fsum(weights)
    scale = max(len(part) / weight for part, weight in zip(parts, weights, strict=True))
    if limit is not None:
        scale = limit / total
    found: list[Example] = []
    for part, weight in zip(parts, weights, strict=True):
        count = max(1, round(scale * weight))
        found += [part[i % len(part)] for i in range(count)]
    return found


def between(examples: Sequence[Example], low: float, high: float) -> list[Example]:
    """The rows whose pass rate lies between two shares, both included. Raises DataError, also where none does."""
    found = [example for example in examples if low <= pass_rate_of(example) <= high]
    if examples and not found:
        raise DataError(
            f"none of {len(examples):,} rows has a {PASS_RATE} from {low:g} to {high:g}",
            remedy="give wider bounds, or other rows",
            file=examples[0].source.rpartition(":")[0],
            field="data.pass_rate",
        )
    return found


def by_difficulty(examples: Sequence[Example], *, easy_first: bool) -> list[Example]:
    """The rows sorted by their pass rate; equal ones stay in the order in which they stood. Raises DataError."""
    return sorted(examples, key=lambda example: -pass_rate_of(example) if easy_first else pass_rate_of(example))


def pass_rate_of(example: Example) -> float:
    """The pass rate of a row, 0 to 1. Raises DataError where its column is not there or holds something else."""
    value = json.loads(example.columns).get(PASS_RATE) if example.columns else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        file, _, line = example.source.rpartition(":")
        raise DataError(
            f"no {PASS_RATE}" if value is None else f"{PASS_RATE} is {value!r}, which is no share from 0 to 1",
            remedy=f"give every row a column {PASS_RATE}, the share of a model's responses that are right; or leave "
            "data.pass_rate and data.order out",
            file=file or example.source,
            line=int(line) if line.isdigit() else None,
            field=PASS_RATE,
        )
    return float(value)
