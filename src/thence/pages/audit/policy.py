"""What an audit says of objectives of reinforcement learning: a row a case, asked for, found, verified, and not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from thence.audit.policy.objective import PolicyObjective
from thence.audit.report import Report
from thence.audit.result import PolicyCheck
from thence.pages.table import NOTHING, Cell, Table, TableRow

HEADERS = ("Case", "Found", "Asked for", "Verified", "Not verified")


def policy_table(report: Report) -> Table:
    """The cases whose objective was compared setting by setting; no rows where there are none."""
    rows = [
        TableRow(result.case.name, (_found(check), _asked(check), _verified(check), _open(check)))
        for result in report.cases
        if (check := result.policy) is not None
    ]
    return Table("", HEADERS, tuple(rows), words=(0, 1, 2, 3))


def _asked(check: PolicyCheck) -> Cell:
    """The settings that are not those of plain GRPO."""
    plain = _plain(asdict(PolicyObjective()))
    other = {name: value for name, value in _plain(check.settings).items() if value != plain.get(name)}
    return Cell(", ".join(f"{name} {_said(value)}" for name, value in other.items()) or "plain GRPO")


def _found(check: PolicyCheck) -> Cell:
    if not check.found:
        return Cell("as asked")
    others = f"or: {'; '.join(check.others)}" if check.others else ""
    return Cell("; ".join(check.found), others, strong=True)


def _verified(check: PolicyCheck) -> Cell:
    return Cell(", ".join(check.verified)) if check.verified else NOTHING


def _open(check: PolicyCheck) -> Cell:
    """Parts that another setting would not have shown, and why: each reason once."""
    by_reason: dict[str, list[str]] = {}
    for part, reason in check.open.items():
        by_reason.setdefault(reason, []).append(part)
    if not by_reason:
        return NOTHING
    return Cell("; ".join(f"{', '.join(parts)} ({reason})" for reason, parts in by_reason.items()))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a report keeps them: None stands for infinity, tuples are lists."""
    return {
        name: None if value == float("inf") else list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
    }


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " and ".join(map(_said, value))
    return "off" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
