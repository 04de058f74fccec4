"""Public reports stand in an audit where adapter, version and settings are theirs, and say what helps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from thence.audit.judge.findings import CATALOGUE
from thence.audit.judge.verdict import judge_all
from thence.audit.result import Case, CaseResult, Finding
from thence.audit.run.runner import adapter_names, load_adapter
from thence.known_faults import load_known_faults

OFFLOAD: dict[str, Any] = {"stage": 2, "offload": "cpu", "accumulation_by": "config"}


def known(target: str, versions: dict[str, str], finding: str, **options: Any) -> list[str]:
    case = CaseResult(Case("case", options=options), "judged", "", (), (Finding(finding, "fault", "x"),))
    return [report.id for report in judge_all([case], versions, target=target).known]


def test_a_report_needs_the_adapter_whose_code_it_is_about() -> None:
    old = {"transformers": "4.45.2", "accelerate": "1.0.1"}
    assert known("transformers", old, "micro-batch-mean") == ["transformers-mean-of-means"]
    assert known("trl-sft", old, "micro-batch-mean") == ["transformers-mean-of-means"]
    for target in ("accelerate", "deepspeed", "check", "command", "my-loop", ""):
        assert not known(target, old, "micro-batch-mean"), f"{target} does not run transformers' Trainer"


def test_a_report_needs_an_affected_version() -> None:
    assert not known("transformers", {"transformers": "5.23.0"}, "micro-batch-mean")
    assert not known("transformers", {}, "micro-batch-mean")
    assert not known("transformers", {"transformers": "git-main"}, "micro-batch-mean")
    assert not known("trl-sft", {"trl": "1.16.0"}, "end-missing"), "nobody knows which versions that report is about"


def test_a_report_needs_the_settings_of_a_case_with_the_finding() -> None:
    version = {"deepspeed": "0.18.2"}
    assert known("deepspeed", version, "first-and-last-only", **OFFLOAD) == ["deepspeed-offload-accumulation"]
    assert known("deepspeed", version, "last-only", **OFFLOAD | {"offload": "none"}) == [
        "deepspeed-zero2-small-gradients"
    ]
    assert known("deepspeed", version, "last-only", **OFFLOAD | {"accumulation_by": "hand"}) == [
        "deepspeed-offload-several-backwards"
    ]
    newest = {"deepspeed": "0.19.8"}
    assert known("deepspeed", newest, "all-but-first", **OFFLOAD | {"accumulation_by": "never"}) == [
        "deepspeed-boundary-never-set-offload"
    ]
    assert not known("deepspeed", newest, "first-and-last-only", **OFFLOAD)


def test_faults_that_were_found_by_the_audit_are_known_by_it() -> None:
    assert known("axolotl-sft", {"axolotl": "0.19.0", "transformers": "5.16.1"}, "micro-batch-mean") == [
        "axolotl-mean-of-means"
    ]
    assert known("ms-swift-sft", {"ms-swift": "4.6.0"}, "scale-accumulation") == [
        "ms-swift-label-smoothing-accumulation"
    ]
    assert not known("ms-swift-sft", {"ms-swift": "4.6.0"}, "micro-batch-mean"), "that has other causes too"
    assert not known("axolotl-sft", {"axolotl": "0.20.0"}, "micro-batch-mean"), "nobody ran that version"


def test_common_cases_carry_the_settings_that_the_adapter_runs_them_with() -> None:
    assert {**OFFLOAD}.items() <= dict(load_adapter("deepspeed").defaults).items()
    assert load_adapter("openrlhf-sft").defaults["offload"] == "none"


def affected_by(version: str, options: dict[str, Any]) -> set[str]:
    return {
        fault.id
        for fault in load_known_faults()
        if fault.package == "deepspeed" and fault.level == "fault" and fault.hits(version) and fault.could_be(options)
    }


def test_no_remedy_leads_from_one_fault_of_deepspeed_to_another() -> None:
    """On 0.18.2, without the offload only the last micro-batch is left; 0.19 is right, where it counts by itself."""
    assert affected_by("0.18.2", OFFLOAD | {"offload": "none"}), "so to switch it off is no remedy"
    for finding in ("first-and-last-only", "last-only", "first-only"):
        assert "offload off" not in CATALOGUE[finding].remedy and "not offload" not in CATALOGUE[finding].remedy
    by_id = {fault.id: fault for fault in load_known_faults()}
    for fault in by_id.values():
        if fault.package == "deepspeed" and "0.19.0" in fault.remedy:
            assert not affected_by("0.19.8", OFFLOAD) and not affected_by("0.19.8", OFFLOAD | {"offload": "none"})
    assert "Do not just switch the offload off" in by_id["deepspeed-offload-accumulation"].remedy
    assert "never set" in by_id["deepspeed-offload-several-backwards"].remedy


@pytest.mark.parametrize("fault", load_known_faults(), ids=lambda fault: fault.id)
def test_entries_name_findings_and_adapters_that_there_are(fault: Any) -> None:
    assert set(fault.findings) <= set(CATALOGUE)
    assert set(fault.adapters) <= set(adapter_names())
    for name in fault.adapters:
        if fault.options:
            assert set(fault.options) & set(load_adapter(name).defaults)
    assert not fault.options or all(values for values in fault.options.values())
    assert not replace(fault, options={"offload": ["cpu"]}).could_be({"offload": "none"})
