"""No trainer is acquitted whose update the audit did not understand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from xml.etree import ElementTree

import pytest
import torch

from tests.audit.homemade import HomeMade
from tests.audit.made_reports import Page
from thence.audit import Report, check
from thence.audit.judge.case import Judge
from thence.audit.judge.cuts import FirstUpdate, difference
from thence.audit.judge.evidence import Evidence
from thence.audit.junit import junit_xml
from thence.audit.pytest_plugin import assert_objective
from thence.audit.report import make_report
from thence.audit.result import Case, CaseResult, Finding
from thence.audit.run.own_step import random_rows
from thence.audit.solve.observation import ForwardRow
from thence.audit.solve.sequences import KnownExample
from thence.audit.text import report_text

SHORT = random_rows(40, lengths=(2, 11, 3, 7))
PART = {
    "padding trained": HomeMade("sgd", extra="padding"),
    "packed rows see each other": HomeMade("sgd", layout="packed", masked=False),
    "packed boundary trained": HomeMade("sgd", layout="packed", extra="boundary"),
    "left padding without mask": HomeMade("sgd", layout="left", masked=False),
    "a step in every micro-batch": HomeMade("sgd", every=True),
}
NEVER_MOVED = {"embedding": "embed_tokens", "norms": "norm"}


def audit(step: HomeMade, tiny_model: Callable[..., Any], **more: Any) -> Report:
    return check(step, model=tiny_model(torch.float32), lr=step.lr, batch=SHORT, **more)


def ids(report: Report) -> set[str]:
    return {finding.id for case in report.cases for finding in case.faults}


@pytest.mark.parametrize("name", PART)
def test_what_only_some_cuts_do_is_a_finding(name: str, tiny_model: Callable[..., Any]) -> None:
    """One cut is as asked and the others cannot be explained: once acquitted as 'no finding'."""
    report = audit(PART[name], tiny_model)
    assert not report.ok and report.verdict.exit_code == 1, str(report)
    assert "depends-on-cut" in ids(report)
    assert "depends on the cut" in report_text(report, colour=False, width=120)


@pytest.mark.slow
@pytest.mark.parametrize("name", PART)
def test_what_only_some_cuts_do_is_a_finding_with_adamw(name: str, tiny_model: Callable[..., Any]) -> None:
    report = check(replace(PART[name], optimizer="adamw"), model=tiny_model(torch.float32))
    assert report.verdict.exit_code == 1 and "depends-on-cut" in ids(report), str(report)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", NEVER_MOVED)
def test_parameters_that_never_move_are_named_first(name: str, optimizer: Any, tiny_model: Callable[..., Any]) -> None:
    step = HomeMade(optimizer, dropped=NEVER_MOVED[name])
    report = check(step, model=tiny_model(torch.float32), lr=step.lr)
    assert report.verdict.exit_code == 1, str(report)
    assert {case.faults[0].id for case in report.cases} == {"parameters-untouched"}
    assert NEVER_MOVED[name] in report.verdict.sentences[0]
    assert all(case.status == "judged" for case in report.cases), "the rest is judged without them"


def test_frozen_parameters_are_frozen_on_purpose(tiny_model: Callable[..., Any]) -> None:
    model = tiny_model(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    report = check(HomeMade("sgd"), model=model, lr=0.5, batch=SHORT)
    assert report.ok, str(report)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_a_right_step_is_acquitted_with_what_was_not_verified(layout: Any, tiny_model: Callable[..., Any]) -> None:
    report = audit(HomeMade("sgd", layout=layout), tiny_model)
    assert report.ok, str(report)
    assert all(case.cut is None or case.cut.share < 1e-5 for case in report.cases)
    said = " ".join(report_text(report, colour=False, width=300).split())
    for word in ("resuming", "data-parallel ranks", "optimizer state"):
        assert any(word in line for line in report.not_verified)
        assert word in said.split("Not verified")[1]
    assert any("other cuts" in line for line in report.verified)
    assert report.not_verified[0] in Page.of(report).text
    assert report.not_verified[0] in junit_xml(report)
    assert list(report.not_verified) == json.loads(json.dumps(report.to_dict()))["not_verified"]


def test_every_way_out_of_an_audit_says_the_same(tiny_model: Callable[..., Any]) -> None:
    """Exit code, report, pytest, JUnit and page: none lets a case pass that was not judged."""
    sound = audit(HomeMade("sgd"), tiny_model)
    for status in ("not judged", "failed"):
        left = replace(sound.cases[1], status=status, reason="36% is unexplained", steps=(), cut=None)
        report = make_report("x", [sound.cases[0], cast(CaseResult, left)], {}, "x", {}, 0.0)
        assert not report.ok and report.verdict.exit_code == 2
        assert "1 of 2 cases could not be judged" in report.verdict.sentences[0]
        suite = ElementTree.fromstring(junit_xml(report).encode()).find("testsuite")
        assert suite is not None and (suite.get("errors"), suite.get("failures")) == ("1", "0")
        assert "could not be judged" in Page.of(report).text
    with pytest.raises(AssertionError, match="depends on the cut"):
        assert_objective(PART["a step in every micro-batch"], model=tiny_model(torch.float32), lr=0.5, batch=SHORT)


def test_a_fault_of_a_case_without_weights_is_a_finding() -> None:
    """Ranks that differ were once passed over where the update could not be explained."""
    differ = Finding("ranks-differ", "fault", "after step 1, rank 1 differs from rank 0 in 3 parameters")
    report = make_report("x", [CaseResult(Case("a"), "not judged", "residual 0.4", (), (differ,))], {}, "x", {}, 0.0)
    assert report.verdict.exit_code == 1
    assert "different models" in report.verdict.sentences[0]
    suite = ElementTree.fromstring(junit_xml(report).encode()).find("testsuite")
    assert suite is not None and (suite.get("errors"), suite.get("failures")) == ("0", "1")
    assert "✗" in report_text(report, colour=False, width=120)


def test_repeated_rows_weigh_per_example_and_are_said(tiny_model: Callable[..., Any]) -> None:
    """Five examples on two ranks, three of them trained twice, to fill four rows each."""
    model = tiny_model(torch.float32)
    rows = random_rows(40, lengths=(2, 11, 3, 7, 5))
    judge = Judge(
        tiny_model(torch.float32), [KnownExample((), (), tuple(r["input_ids"]), tuple(r["labels"])) for r in rows],
        [str(i) for i in range(40)], -1, None,
    )  # fmt: skip
    order = [0, 1, 2, 3, 4, 0, 1, 2]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    HomeMade("sgd")(model, [cast(Any, rows[i]) for i in order], 1, 8)
    after = {n: p.detach().clone() for n, p in model.named_parameters()}
    forward = [
        ForwardRow(tuple(rows[e]["input_ids"]), (1,) * len(rows[e]["input_ids"]), None, place // 2, place % 2)
        for place, e in enumerate(order)
    ]
    case = Case("5 examples, 2 ranks", 1, 4, ranks=2, examples=5, lr=0.5)
    result = judge.case(case, Evidence([before, after], rows=[forward]))
    report = make_report("x", [result], {}, "x", {}, 0.0)
    weight = {row.example: row.weight for row in result.steps[0].sequences}
    assert weight[0] == pytest.approx(2 * weight[4], rel=1e-3)
    assert result.steps[0].largest == pytest.approx(2 * result.steps[0].smallest, rel=1e-3)
    text = " ".join(report_text(report, colour=False, width=200).split())
    assert "✓ 5 examples" not in text and "~ 5 examples" in text
    assert "examples 1, 2 and 3 are trained 2 times" in text
    assert "trained 2 times" in report.verdict.sentences[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_what_rounding_parts_is_no_other_update(precision: str) -> None:
    """Under Adam few signs may turn; otherwise the norm of the difference counts."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(4000, generator=generator).numpy()
    signs = {"a": 1e-3 * (gradient > 0) - 1e-3 * (gradient <= 0)}
    turned = {"a": signs["a"].copy()}
    turned["a"][:100] *= -1

    def of(change: Any) -> FirstUpdate:
        return FirstUpdate((0,), change, 0.0, precision)

    assert difference(of(signs), of(signs)).share == 0
    found = difference(of(signs), of(turned))
    assert found.measure == "signs" and found.share == pytest.approx(0.025) and found.share > found.allowed
    near = difference(of({"a": gradient}), of({"a": gradient * 1.003}))
    far = difference(of({"a": gradient}), of({"a": gradient * 1.2}))
    assert near.measure == "norm" and near.share <= near.allowed
    assert far.share > far.allowed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("step", [HomeMade("sgd", layout="left"), HomeMade("adamw")])
def test_no_false_alarm_over_families_and_optimizers(step: HomeMade, kind: str, tiny_model: Callable[..., Any]) -> None:
    report = check(step, model=tiny_model(torch.float32, kind), lr=step.lr)
    assert report.ok, str(report)
