"""Loops as people write them, in the style of nanochat and of LitGPT: right as they are, and with their mistakes."""

from __future__ import annotations

import sys

import pytest

from tests import ROOT
from thence.audit import Report
from thence.audit.run.program import allowed_cases, audit_program, placeholders

TARGETS = ROOT / "benchmarks" / "audit_targets"
LOOPS = {
    "nanochat": (
        "messages",
        ["--model", "{model}", "--data", "{data}", "--out", "{out}", "--device-batch-size", "{micro_batch}",
         "--examples-per-step", "{batch}"],
    ),
    "litgpt": (
        "prompt-completion",
        ["--checkpoint-dir", "{model}", "--data", "{data}", "--out-dir", "{out}", "--train.micro-batch-size",
         "{micro_batch}", "--train.global-batch-size", "{batch}"],
    ),
}  # fmt: skip
NAMED = {
    ("nanochat", "means"): ("micro-batch-mean", ""),
    ("nanochat", "zero-late"): ("all-but-first", "every micro-batch but the first"),
    ("nanochat", "mask-late"): ("first-missing", ""),
    ("nanochat", "mask-early"): ("tokens-dropped", "shifted by one place to the front"),
    ("nanochat", "crop"): ("tokens-dropped", "beyond position 12 of a response"),
    ("nanochat", "wrap"): ("double-counted", "example 1"),
    ("litgpt", "means"): ("micro-batch-mean", ""),
    ("litgpt", "prompt"): ("prompt-trained", ""),
    ("litgpt", "truncate"): ("tokens-dropped", "beyond position 16 of the row"),
    ("litgpt", "no-end"): ("end-missing", ""),
    ("litgpt", "never-full"): ("no-step", ""),
}


def words(loop: str, mistake: str = "") -> list[str]:
    return [sys.executable, str(TARGETS / f"{loop}_style.py"), *LOOPS[loop][1], "--mistake", mistake]


def audit(loop: str, mistake: str = "", *only: str) -> Report:
    return audit_program(words(loop, mistake), layout=LOOPS[loop][0], only=only or ["micro 2 x 4"])


def test_the_whole_batch_and_the_micro_batch_give_the_accumulation() -> None:
    cases, reasons = allowed_cases(placeholders(words("litgpt")), "token-mean", quick=False)
    assert {"micro 2 x 4", "7 examples, micro 2 x 4"} <= {case.name for case, reason in cases if not reason}
    assert not any("accumulation" in reason for reason in reasons)


@pytest.mark.matrix(1)
@pytest.mark.slow
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_right_is_acquitted(loop: str) -> None:
    report = audit(loop, "", "micro 4 x 2", "7 examples, micro 2 x 4")
    assert report.ok, str(report)


@pytest.mark.matrix(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("loop", "mistake"), [("nanochat", "crop"), ("nanochat", "zero-late"), ("litgpt", "never-full")]
)
def test_the_mistakes_of_such_loops_are_named(loop: str, mistake: str) -> None:
    finding, detail = NAMED[loop, mistake]
    seven = mistake in ("wrap", "never-full")
    report = audit(loop, mistake, *(["7 examples, micro 2 x 4"] if seven else []))
    found = {f.id: f.detail for case in report.cases for f in case.faults}
    assert list(found) == [finding], str(report)
    assert detail in found[finding]


@pytest.mark.everything
@pytest.mark.slow
@pytest.mark.parametrize(("loop", "mistake"), [("nanochat", "padding")])
def test_what_no_weights_explain_is_not_acquitted(loop: str, mistake: str) -> None:
    """Seen in the cut: with one row or one micro-batch nothing is wrong."""
    assert not audit(loop, mistake, "micro 1 x 8", "micro 4 x 2").ok
