"""Public reports of what the audit finds, from the same file that ``thence doctor`` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from thence.audit.result import KnownFault
from thence.known_faults import load_known_faults


def known_faults(versions: Mapping[str, str], findings: Sequence[str]) -> tuple[KnownFault, ...]:
    """Known faults of the audited packages that show as one of the findings.

    Reports that name other versions than the audited ones are left out.
    """
    result = []
    for fault in load_known_faults():
        if fault.package in versions and set(fault.findings) & set(findings):
            installed = fault.hits(versions[fault.package])
            if fault.affected is not None and not installed:
                continue
            affected = fault.affected or "not known"
            result.append(KnownFault(fault.id, fault.package, affected, fault.remedy, fault.sources, installed))
    return tuple(result)
