"""Whether the parts of kept results belong together: a file edited by hand may name what it does not hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from thence.wording import shown

if TYPE_CHECKING:  # the records use this module when they are read
    from thence.compare.result import Comparison, Run


def what_does_not_belong(found: Comparison) -> tuple[str, str] | None:
    """The first field that names what the results do not hold, and what it names; None: all belongs together."""
    return next(_misfits(found), None)


def _misfits(found: Comparison) -> Iterator[tuple[str, str]]:
    arms = {arm.name for arm in found.arms}
    test_sets = {name for c in found.columns for name in (c.split, f"{c.split}@{c.temperature:g}")}
    if not found.columns:
        yield "columns", "there is no test set"
    if found.reference not in arms:
        yield "reference", f"there is no arm {shown(found.reference)}"
    for arm in found.arms:
        if arm.after and arm.after not in arms:
            yield f"arms.{arm.name}.after", f"there is no arm {shown(arm.after)}"
    for number, run in enumerate(found.runs):
        yield from _misfits_of_run(f"runs[{number}]", run, found, arms)
    asked: list[tuple[str, Any]] = [("covariate", found.covariate)] if found.covariate else []
    asked += [(f"contrasts[{number}]", contrast) for number, contrast in enumerate(found.contrasts)]
    for where, names in asked:
        other = names.get("other", [])
        for arm in (names.get("arm"), *(other if isinstance(other, list | tuple) else [other])):
            if arm not in arms:
                yield where, f"there is no arm {shown(arm)}"
        for test_set in (names.get("column"), names.get("choose_on")):
            if test_set and test_set not in test_sets:
                yield where, f"there is no test set {shown(test_set)}"


def _misfits_of_run(where: str, run: Run, found: Comparison, arms: set[str]) -> Iterator[tuple[str, str]]:
    if run.arm not in arms:
        yield f"{where}.arm", f"there is no arm {shown(run.arm)}"
    if run.base not in found.bases:
        yield f"{where}.base", f"there is no base {shown(run.base)}"
    there = {measured.column for measured in run.measured}
    for column in found.columns:
        if column not in there:
            yield f"{where}.measured", f"nothing was measured on {shown(column.split)} at T = {column.temperature:g}"
    for measured in run.measured:
        if not measured.right or any(not 0 <= right <= measured.samples for right in measured.right):
            said = f"right answers of a problem lie between 0 and {measured.samples}"
            yield f"{where}.measured", f"{shown(measured.column.split)}: {said}"
