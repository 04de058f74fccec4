"""The audit of the audit, reinforcement learning: every fault is named, and nothing is found in the clean steps.

``THENCE_AUDIT_PROBES`` sets the probes of a fault; the clean steps get ten times as many. The table with 50 is made by
``benchmarks/audit_mutation.py``.
"""

from __future__ import annotations

import os

import pytest

from tests.audit import policy_mutation as made
from tests.audit.mutation import named
from tests.audit.test_mutation import said
from thence.faults.catalogue import FAULTS

PROBES = int(os.environ.get("THENCE_AUDIT_PROBES", "1"))
SEED = int(os.environ.get("THENCE_AUDIT_SEED", "1"))
NAMES = [fault.name for fault in made.policy_faults()]


@pytest.mark.matrix(4)
@pytest.mark.parametrize("name", NAMES)
def test_every_fault_is_named(name):
    for probe in made.probes(FAULTS[name], PROBES, SEED):
        result = made.judge_probe(probe, [name])
        assert result.status == "judged", (probe, said(result))
        assert named(result, FAULTS[name]), (probe, said(result))


def check_clean(count: int) -> None:
    for probe in made.probes(None, count, SEED):
        result = made.judge_probe(probe, [])
        found = [finding for finding in result.all_findings if finding.kind != "choice"]
        assert (result.status, found) == ("judged", []), (probe, said(result))


def test_nothing_is_found_in_the_clean_steps():
    check_clean(2)


@pytest.mark.slow
def test_nothing_is_found_in_the_clean_steps_of_many_probes():
    check_clean(10 * PROBES)


@pytest.mark.slow
def test_probes_differ_in_everything_that_is_drawn():
    drawn = made.probes(None, 30, SEED)
    assert {probe.case.ranks for probe in drawn} == {1, 2}
    assert {len(probe.steps) for probe in drawn} >= {1, 2, 3}
    assert {len(set(probe.versions)) for probe in drawn} == {1, 2}
    assert {probe.asked.normaliser for probe in drawn} == set(made.NORMALISERS)
    assert {probe.asked.ratio for probe in drawn} == {"token", "sequence-token"}
    assert {probe.asked.correction for probe in drawn} == {"none", "truncate"}
    assert {probe.asked.truncated for probe in drawn} == {"train", "mask"}
    assert {bool(probe.asked.kl) for probe in drawn} == {True, False}
    assert {probe.asked.temperature for probe in drawn} == {0.8, 1.0}
    assert any(rollout.environment for probe in drawn for rollout in probe.rollouts)
