"""Resuming, saving and evaluating under audit: each mistake of a plain loop is named, a right loop is not accused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.audit import beyond_adapter
from thence.audit import Report, audit_stack
from thence.audit.judge.saved import lacking_findings, merged_findings, plain_names
from thence.audit.judge.scope import BEYOND
from thence.audit.result import CaseResult

ADAPTER = str(Path(__file__).with_name("beyond_adapter.py"))


@pytest.fixture(scope="module")
def report() -> Report:
    return audit_stack(ADAPTER, only=["resume", "saved", "evaluation"])


def results(report: Report, right: bool) -> list[CaseResult]:
    return [result for result in report.cases if (" wrong: " not in result.case.name) == right]


@pytest.mark.slow
@pytest.mark.parametrize("kind", beyond_adapter.FOUND)
def test_every_mistake_beyond_the_step_has_its_name(report: Report, kind: str) -> None:
    wrong = [result for result in results(report, right=False) if result.case.beyond == kind]
    found = {result.case.options["wrong"]: {f.id for f in result.faults} for result in wrong}
    assert found == {mistake: {name} for mistake, name in beyond_adapter.FOUND[kind].items()}, str(report)
    assert report.verdict.exit_code == 1


@pytest.mark.slow
def test_a_loop_that_does_it_right_is_not_accused_and_the_report_says_what_was_verified(report: Report) -> None:
    for result in results(report, right=True):
        assert (result.status, result.all_findings) == ("judged", ()), str(report)


def test_resuming_saving_and_evaluating_are_verified_by_name() -> None:
    clean = ["resume after 2", "what is saved after 2", "evaluation in batches"]
    found = audit_stack(ADAPTER, only=clean)
    assert found.verdict.exit_code == 0, str(found)
    assert [line.split(":")[0] for line in found.verified] == list(BEYOND.values())
    assert not set(BEYOND.values()) & {line.split(":")[0] for line in found.not_verified}
    assert "position in the data;" in next(line for line in found.verified if line.startswith(BEYOND["resume"]))
    one = audit_stack(ADAPTER, only=[clean[1], "resume wrong: schedule"])
    assert one.verdict.exit_code == 1 and "learning rate" in one.verdict.sentences[0]
    assert "beyond-adapter does not resume as it should." in str(one)
    assert [line.split(":")[0] for line in one.not_verified][:2] == [BEYOND["resume"], BEYOND["evaluation"]]


def test_a_position_in_the_data_that_the_loop_of_the_audit_keeps_is_not_verified() -> None:
    report = audit_stack(ADAPTER, only=["own position"])
    assert report.verdict.exit_code == 0, str(report)
    assert report.verified[0].startswith(f"{BEYOND['resume']}: weights, optimizer state, schedule; rows"), (
        report.verified
    )
    assert report.not_verified[0].startswith(f"{BEYOND['resume']}, position in the data"), report.not_verified


def test_adapters_that_are_not_merged_once_are_named() -> None:
    torch.manual_seed(0)
    base, up, down = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
    place = "model.layers.0.mlp.up_proj"
    live = {f"{place}.base_layer.weight": base, "model.norm.weight": torch.ones(4)}
    live |= {f"{place}.lora_A.default.weight": up, f"{place}.lora_B.default.weight": down}

    def found(share: float) -> list[str]:
        saved = {f"{place}.weight": base + share * 2.0 * down @ up, "model.norm.weight": torch.ones(4)}
        return [finding.id for finding in merged_findings(live, saved, 2.0)]

    assert found(1.0) == []
    assert [found(share) for share in (0.0, 0.5, 2.0)] == [["saved-merge"]] * 3
    assert plain_names({f"base_model.model.{place}.lora_A.weight": up}).keys() == {f"{place}.lora_A.default.weight"}


def test_a_tied_head_may_be_left_out_but_not_hold_something_else() -> None:
    live, aliases = {"embed.weight": torch.ones(3)}, {"head.weight": "embed.weight"}
    saved = {"embed.weight": torch.ones(3)}
    assert not lacking_findings(live, saved, aliases)
    assert not lacking_findings(live, {"head.weight": torch.ones(3)}, aliases)
    assert [f.id for f in lacking_findings(live, saved | {"head.weight": torch.zeros(3)}, aliases)] == ["saved-untied"]
    assert [f.id for f in lacking_findings(live, {}, aliases)] == ["saved-missing"]
