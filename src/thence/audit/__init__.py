"""Recover the weight every token got from any trainer's real optimizer steps, and name the fault.

`check(step, model=model)` audits a step of your own, `check_policy(step, model=model)` one of reinforcement learning;
`audit_stack("trl-sft")` a stack that has an adapter;
`audit_program([...])` any program. See docs/audit.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thence.audit.policy.objective import PolicyObjective
    from thence.audit.report import Report
    from thence.audit.run.own_policy import check_policy
    from thence.audit.run.own_step import check, random_rows
    from thence.audit.run.program import audit_program
    from thence.audit.run.stack import audit_stack

__all__ = ["PolicyObjective", "Report", "audit_program", "audit_stack", "check", "check_policy", "random_rows"]

_HOMES = {
    "Report": "report",
    "audit_program": "run.program",
    "audit_stack": "run.stack",
    "check": "run.own_step",
    "check_policy": "run.own_policy",
    "PolicyObjective": "policy.objective",
    "random_rows": "run.own_step",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line starts without torch."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"thence.audit.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'thence.audit' has no attribute {name!r}")
