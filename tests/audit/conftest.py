"""The probe of the audit's tests and its judge, made once for each file."""

from __future__ import annotations

import pytest

from thence.audit.judge.case import Judge
from thence.audit.solve.probe import Probe, write_probe


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    return write_probe(tmp_path_factory.mktemp("probe"))


@pytest.fixture(scope="module")
def judge(probe: Probe) -> Judge:
    return Judge.of_probe(probe)
