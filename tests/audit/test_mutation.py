"""The audit of the audit: every fault is named on random probes, and nothing is found in the clean step.

``THENCE_AUDIT_PROBES`` sets the probes of a fault; the clean step gets ten times as many. The table with 50 is made
by ``benchmarks/audit_mutation.py``.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.audit import mutation
from thence.audit.result import CaseResult
from thence.faults.catalogue import FAULTS

PROBES = int(os.environ.get("THENCE_AUDIT_PROBES", "3"))
SEED = int(os.environ.get("THENCE_AUDIT_SEED", "1"))
SUPERVISED = [name for name, fault in FAULTS.items() if not fault.needs.features]
"""Those of reinforcement learning are in ``test_policy_mutation.py``."""
PAPER = ("first-and-last-only", "mean-of-means")


def said(result: CaseResult) -> str:
    """For a message: everything that was found."""
    found = "; ".join(f"{finding.id} ({finding.detail})" for finding in result.all_findings)
    return f"{result.status} {result.reason}: {found or 'nothing'}"


def check_named(name: str, count: int) -> None:
    for probe in mutation.probes(FAULTS[name], count, SEED):
        result = mutation.judge_probe(probe, [name])
        assert result.status == "judged", (probe, said(result))
        assert mutation.named(result, FAULTS[name]), (probe, said(result))


def check_clean(count: int, seed: int) -> None:
    for probe in mutation.probes(None, count, seed):
        result = mutation.judge_probe(probe, [])
        # An objective that was asked for is named as the choice that it is.
        found = [finding for finding in result.all_findings if finding.kind != "choice"]
        assert (result.status, found) == ("judged", []), (probe, said(result))


@pytest.mark.parametrize("name", PAPER)
def test_the_bugs_of_the_paper_are_named(name):
    check_named(name, 1)


def test_nothing_is_found_in_the_clean_step():
    check_clean(5, SEED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPERVISED)
def test_every_fault_is_named(name):
    check_named(name, PROBES)


@pytest.mark.slow
def test_nothing_is_found_in_the_clean_step_of_many_probes():
    check_clean(10 * PROBES, SEED + 1)


def test_probes_differ_in_everything_that_is_drawn():
    drawn = mutation.probes(None, 200, SEED)
    assert {probe.case.ranks for probe in drawn} == {1, 2, 3}
    assert {probe.case.micro_batch for probe in drawn} == {1, 2, 3}
    assert {probe.case.accumulation for probe in drawn} == {1, 2, 3, 4, 5}
    assert {probe.case.precision for probe in drawn} == {"float32", "autocast"}
    assert {probe.case.asked for probe in drawn} == {"token-mean", "sequence-mean", "constant-divisor"}
    assert {probe.case.steps for probe in drawn} == {1, 2}
    assert {probe.engine_packing for probe in drawn} == {True, False}
    assert {probe.advantages is None for probe in drawn} == {True, False}
    assert len({len(probe.responses) for probe in drawn}) > 10


def test_probes_are_the_same_for_the_same_seed():
    fault = FAULTS["mean-of-means"]
    assert mutation.probes(fault, 3, 5) == mutation.probes(fault, 3, 5)
    assert mutation.draw_probe(random.Random(1), fault) != mutation.draw_probe(random.Random(2), fault)
