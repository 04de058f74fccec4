"""The lock of hashes and the check of it (tools/lock.py, tools/audit_dependencies.py), without the network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import ROOT

sys.path.insert(0, str(ROOT / "tools"))

import audit_dependencies

import lock

FILES = [ROOT / "lock" / name for name in audit_dependencies.FILES]


def test_the_lock_is_that_of_the_constraints_with_hashes_for_every_package() -> None:
    pins = lock.read_pins((ROOT / "constraints.txt").read_text())
    assert len(pins) > 70
    rest, cpu, cuda = (lock.read_pins(file.read_text()) for file in FILES)
    assert not audit_dependencies.stale(pins, rest | cpu)
    assert cpu == {"torch": pins["torch"]} and cuda["torch"] == pins["torch"]
    assert not audit_dependencies.without_hashes(FILES)


def test_pip_cannot_take_the_wrong_build_of_torch() -> None:
    rest, cpu, cuda = (lock.read_hashes(file.read_text()) for file in FILES)
    assert not set(rest) & {*cpu, *cuda}
    assert not set(cpu["torch"]) & set(cuda["torch"])


def test_a_lock_survives_being_written_and_read() -> None:
    pins, hashes = {"a-b": "1.0", "c": "2+cpu"}, {"a-b": ["0" * 64, "1" * 64], "c": ["2" * 64]}
    text = lock.lock_text("requirements.txt", pins, hashes)
    assert lock.read_pins(text) == pins
    assert lock.read_hashes(text) == hashes


def test_what_is_not_as_locked_is_found() -> None:
    pins = {"numpy": "2.0", "torch": "2.13.0", "jinja2": "3.1"}
    fine = {"numpy": "2.0", "torch": "2.13.0+cpu", "pip": "1", "thence": "0.1.0"}
    assert audit_dependencies.differing(fine, pins) == []
    found = audit_dependencies.differing(fine | {"numpy": "2.1", "leftpad": "1"}, pins)
    assert [line.split()[0] for line in found] == ["leftpad", "numpy"]
    assert len(audit_dependencies.stale({"numpy": "2.1", "new": "1"}, pins)) == 4


def test_packages_that_pip_audit_left_out_are_not_taken_for_safe(capsys: pytest.CaptureFixture[str]) -> None:
    flaw = {"id": "PYSEC-1", "fix_versions": ["2"], "aliases": [], "description": ""}
    bad = {"name": "a", "version": "1", "vulns": [flaw]}
    good = {"name": "b", "version": "1", "vulns": []}
    skipped = {"name": "c", "version": "1", "skip_reason": "Dependency not found on PyPI and could not be audited"}
    assert audit_dependencies.read_audit(json.dumps({"dependencies": [bad, good]})) == ["a 1: PYSEC-1, fixed in 2"]
    for packages in ([good, skipped], []):
        with pytest.raises(audit_dependencies.NotAsked):
            audit_dependencies.read_audit(json.dumps({"dependencies": packages}))
    with pytest.raises(audit_dependencies.NotAsked):
        audit_dependencies.read_audit(json.dumps({"dependencies": [bad, skipped]}))
    assert "a 1: PYSEC-1" in capsys.readouterr().out
    with pytest.raises(audit_dependencies.NotAsked):
        audit_dependencies.read_audit("no network")


@pytest.mark.parametrize("error", [None, "no database"])
def test_the_exit_code_tells_found_from_not_checked(
    error: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(files: list[Path]) -> list[str]:
        if error:
            raise audit_dependencies.NotAsked(error)
        return []

    monkeypatch.setattr(audit_dependencies, "vulnerable", asked)
    monkeypatch.setattr(audit_dependencies, "differing", lambda installed, locked: [])
    assert audit_dependencies.main([]) == (3 if error else 0)
    assert ("NOT CHECKED" in capsys.readouterr().out) == bool(error)
    monkeypatch.setattr(audit_dependencies, "differing", lambda installed, locked: ["x"])
    assert audit_dependencies.main([]) == 1
