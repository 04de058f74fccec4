"""The report of an audit, and how it is made from judged cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from thence import __version__
from thence.audit.judge.scope import verified
from thence.audit.judge.settle import settle
from thence.audit.judge.verdict import judge_all, not_told_apart
from thence.audit.result import AuditVerdict, CaseResult
from thence.audit.solve.probe import Probe
from thence.audit.text import report_text
from thence.redaction import redacted


@dataclass(frozen=True)
class Report:
    """One audit.

    Args:
        target: the adapter's name, ``command`` or ``check``.
        versions: of the stack's packages and of Python, as the audited environment has them.
        command: what to type to repeat it.
        cases: in the order of the matrix.
        not_told_apart: sentences on what this matrix could not tell apart, and why.
        probe: model family, number of parameters, tokens, seed.
        date: ISO date and time, UTC.
        seconds: wall time of the audit.
        import_seconds: of which the stack's own imports took.
        verified: what was verified, a line each.
        not_verified: what was not, a line each.
    """

    target: str
    versions: Mapping[str, str]
    command: str
    cases: tuple[CaseResult, ...]
    verdict: AuditVerdict
    not_told_apart: tuple[str, ...]
    probe: Mapping[str, Any]
    thence: str
    date: str
    seconds: float
    import_seconds: float = 0.0
    verified: tuple[str, ...] = ()
    not_verified: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every case was judged (settings that the stack lacks apart) and trained what was asked for."""
        return self.verdict.outcome == "no finding"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        return report_text(self)


def make_report(
    target: str,
    cases: Sequence[CaseResult],
    versions: Mapping[str, str],
    command: str,
    probe: Probe | Mapping[str, Any],
    seconds: float,
    asked: str = "",
    reasons: Sequence[str] = (),
    imports: float = 0.0,
) -> Report:
    """The report of a judged matrix.

    Args:
        asked: the objective asked for where cases differ; empty: that of the first judged case.
        reasons: why rules cannot be told apart, beside what the cases say.
        imports: seconds that the stack's own imports took.
        Others: see :class:`Report`.
    """
    cases = settle([replace(case, reason=redacted(case.reason)) for case in cases], asked)
    seen, unseen = verified(cases)
    return Report(
        target=target,
        versions=versions,
        command=redacted(command),
        cases=tuple(cases),
        verdict=judge_all(cases, versions, asked, target),
        not_told_apart=not_told_apart(cases, reasons),
        probe=probe.describe() if isinstance(probe, Probe) else probe,
        thence=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
        import_seconds=round(imports, 1),
        verified=seen,
        not_verified=unseen,
    )
