"""For the tests of a trainer: assertions on the weight that every token gets.

Installed with thence; pytest finds it by its entry point. In a test:

    def test_every_token_counts_the_same(audit_token_mean):
        audit_token_mean(my_step, model=tiny_model())
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from thence.audit.report import Report


def assert_objective(step: Callable[..., Any], asked: str = "token-mean", **arguments: Any) -> Report:
    """Assert that a step gives every token the weight that the objective asks for; see ``thence.audit.check``.

    Raises:
        AssertionError: with the weights of every case, if it does not, or if it could not be judged.
    """
    __tracebackhide__ = True
    from thence.audit import check

    report = check(step, asked=asked, **arguments)
    if not report.ok:
        raise AssertionError(f"\n{report}")
    return report


@pytest.fixture
def audit_token_mean() -> Callable[..., Report]:
    """``audit_token_mean(step, model=...)``: every trained token of the step has the same weight."""
    return _asserting("token-mean")


@pytest.fixture
def audit_sequence_mean() -> Callable[..., Report]:
    """``audit_sequence_mean(step, model=...)``: every row has the same weight, shared by its tokens."""
    return _asserting("sequence-mean")


@pytest.fixture
def audit_objective() -> Callable[..., Report]:
    """``audit_objective(step, "rank-mean", model=...)``: any objective by its name."""
    return assert_objective


def _asserting(asked: str) -> Callable[..., Report]:
    def audit(step: Callable[..., Any], **arguments: Any) -> Report:
        __tracebackhide__ = True
        return assert_objective(step, asked, **arguments)

    return audit
