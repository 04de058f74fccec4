"""``thence audit thence``: every method has a case, and a broken term of a mixed policy has its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.audit import mixed_adapter
from thence.audit import audit_stack
from thence.audit.adapters import thence as adapter
from thence.methods.registry import methods

ADAPTER = str(Path(__file__).with_name("mixed_adapter.py"))
WRONG = {
    **{f"{case}: {wrong}": found for wrong, (case, _, found) in mixed_adapter.FOUND.items()},
    **{f"RL: loop: {wrong}": found for wrong, (_, found) in mixed_adapter.LOOP.items() if found},
}


FEW = (
    "rl_sft_loss: coefficient doubled",
    "uft: hint missing",
    "srft: prompt trained",
    "trapo: plain likelihood of a prefix",
    "RL: loop: padding, counted",
    "grpo, several turns: observations trained",
)
"""A sample for every day; the others are slow."""


def test_every_method_has_a_case() -> None:
    with_case = {case["options"].get("method", "sft") for case in adapter.CASES}
    assert with_case == set(methods())


def test_every_method_but_plain_sft_is_asked_several_steps_by_a_policy_objective() -> None:
    asked = {case["options"]["method"] for case in adapter.CASES if "policy" in case["options"]}
    assert asked == methods().keys() - {"sft"}


def check_named(names: Sequence[str]) -> None:
    report = audit_stack(ADAPTER, only=names)
    for name in names:
        case = next(case for case in report.cases if case.case.name == name)
        assert {fault.id for fault in case.faults} == {WRONG[name]}, (name, case.status, case.reason, case.faults)
    assert report.verdict.exit_code == 1


def test_a_broken_term_is_named() -> None:
    check_named(FEW)


@pytest.mark.everything
@pytest.mark.slow
def test_every_broken_term_is_named() -> None:
    check_named(list(WRONG))


@pytest.mark.everything
@pytest.mark.slow
def test_another_divergence_than_the_one_asked_for_never_passes() -> None:
    names = [f"{case}: {wrong}" for wrong, (case, _) in mixed_adapter.UNEXPLAINED.items()]
    report = audit_stack(ADAPTER, only=names)
    for case in report.cases:
        assert case.status == "not judged" and "no weighted sum of token gradients" in case.reason, case.case.name
    assert len(report.cases) == len(names) and report.verdict.exit_code != 0


def test_a_loop_that_pads_and_trains_responses_alone_is_not_accused() -> None:
    report = audit_stack(ADAPTER, only=["RL: loop: nothing"])
    assert [(c.status, c.faults) for c in report.cases] == [("judged", ())], str(report)
    assert report.verdict.exit_code == 0 and "prompts" in report.cases[0].policy.verified  # pyright: ignore
