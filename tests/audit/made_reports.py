"""Reports of an audit made by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.report import Report
from thence.audit.result import (
    AuditVerdict,
    Case,
    CaseResult,
    Finding,
    PublicReport,
    Role,
    SequenceWeights,
    StepResult,
    TokenWeight,
)
from thence.pages.audit.page import render_page

LENGTHS = (2, 34, 3, 21, 5, 13, 8, 4, 17, 6)
HOSTILE = "</script><b>bold</b>\x1b[31m\x00<img src=x onerror=alert(1)>"
Weights = Callable[[StepRows], np.ndarray]


def token_mean(window: StepRows) -> np.ndarray:
    return OBJECTIVES["token-mean"].weights(window)


def first_and_last_only(window: StepRows) -> np.ndarray:
    kept = (window.micro_batch == 0) | (window.micro_batch == window.micro_batch.max())
    return np.where(kept, token_mean(window), 0.0)


def mean_of_means(window: StepRows) -> np.ndarray:
    return OBJECTIVES["micro-batch-mean"].weights(window)


def a_row(example: int, micro_batch: int | None, rank: int | None, weight: float, ideal: float) -> SequenceWeights:
    length = LENGTHS[example]
    letters = "".join(chr(97 + (example * 7 + t * t) % 26) for t in range(length + 3))
    body: list[Role] = ["body"] * (length - 2)
    roles: list[Role] = ["prompt", "prompt", "prompt", "prompt", "first", *body, "end"]
    texts = [*letters[:3], "<|assistant|>", *letters[4 : 4 + length - 1], "<|end|>"]
    tokens = tuple(
        TokenWeight(text, role, *((0.0, 0.0, 0.0) if role == "prompt" else (weight, ideal, weight / ideal)))
        for text, role in zip(texts, roles, strict=True)
    )
    return SequenceWeights(example, micro_batch, rank, weight / ideal, tokens)


def a_step(
    case: Case,
    weights: Weights,
    index: int = 1,
    examples: Sequence[int] | None = None,
    *findings: Finding,
    objective: str,
) -> StepResult:
    rows = list(range(case.window) if examples is None else examples)
    at = np.arange(len(rows))
    micro_batch = at // (case.micro_batch * case.ranks)
    rank = at // case.micro_batch % case.ranks
    window = StepRows(np.array([LENGTHS[e] for e in rows]), micro_batch, rank)
    got, ideal = weights(window), token_mean(window)
    sequences = tuple(
        a_row(e, int(m), int(r), float(w), float(i))
        for e, m, r, w, i in zip(rows, micro_batch, rank, got, ideal, strict=True)
    )
    ratios, scale = got / ideal, float((got * window.lengths).sum())
    lost = float((ideal * window.lengths * np.clip(1 - ratios / scale, 0, None)).sum())
    mean = float((ratios * window.lengths).sum() / window.lengths.sum())
    roles = {"prompt": 0.0, "first": float(ratios.mean()), "body": mean, "end": float(ratios.mean())}
    return StepResult(
        index, objective, (), 3.1e-7, 2e-6, 41.2, 2e-3, scale, float(ratios.min()), float(ratios.max()), lost, roles,
        sequences, findings,
    )  # fmt: skip


def judged(case: Case, weights: Weights, *findings: Finding, objective: str = "token-mean") -> CaseResult:
    steps = tuple(a_step(case, weights, i + 1, None, *findings, objective=objective) for i in range(case.steps))
    return CaseResult(case, "judged", "", steps, seconds=1.25)


def a_report(cases: Sequence[CaseResult], verdict: AuditVerdict, target: str = "trl") -> Report:
    return Report(
        target,
        {"trl": "1.16.0", "transformers": "5.23.0", "torch": "2.13.0", "python": "3.11.9"},
        f"thence audit {target} --python env/bin/python --seed 0",
        tuple(cases),
        verdict,
        (),
        {"model_type": "llama", "seed": 0, "examples": 12, "trained tokens": 127},
        "0.2.0",
        "2026-07-04T12:00:00Z",
        31.4,
    )


CASES = (
    Case("micro 8 x 1", 8, 1),
    Case("micro 2 x 4", 2, 4),
    Case("micro 1 x 8", 1, 8),
    Case("micro 2 x 2, 2 ranks", 2, 2, ranks=2),
    Case("three steps, micro 2 x 2", 2, 2, steps=3, epochs=2, lr=0.1),
)
LEFT = (
    CaseResult(Case("packing, micro 1 x 1", 1, 1, packing=True), "skipped", "the stack has no rows laid end to end"),
    CaseResult(Case("AdamW, micro 2 x 4", optimizer="adamw"), "failed", f"RuntimeError: boom {HOSTILE}", seconds=0.4),
    CaseResult(Case("bfloat16, micro 2 x 4", precision="bfloat16"), "not judged", "88% of the update is unexplained"),
)


def clean() -> Report:
    said = (
        "In all 5 judged cases the weights are those of the token mean, which was asked for.",
        "Token weights lie between 1.000 and 1.000 of what they should be.",
    )
    return a_report(
        [judged(c, token_mean) for c in CASES], AuditVerdict("no finding", "token-mean", "token-mean", said)
    )


def dropping() -> Report:
    """Offload of the optimizer keeps the first and the last micro-batch only, where there are more than two."""
    lost = Finding("first-and-last-only", "fault", "only the first and the last micro-batch of 4 arrived")
    cases = [
        judged(CASES[0], token_mean),
        judged(CASES[1], first_and_last_only, lost),
        judged(CASES[2], first_and_last_only, lost),
        judged(CASES[3], token_mean),
        judged(CASES[4], token_mean),
        *LEFT,
    ]
    said = (
        "This trainer is asked for the token mean, but in 2 of 5 cases: first and last micro-batch only.",
        "The micro-batches between the first and the last never reach the optimizer.",
    )
    known = PublicReport(
        "zero2-cpu-offload",
        "deepspeed",
        "<0.18.0",
        "Install deepspeed 0.18.0 or later.",
        ("https://github.com/deepspeedai/DeepSpeed/issues/1", "javascript:alert(1)"),
        True,
    )
    verdict = AuditVerdict("finding", "token-mean", "token-mean", said, "Switch the optimizer offload off.", (known,))
    report = a_report(cases, verdict, "deepspeed")
    return replace(report, not_told_apart=("Rank means and token means: no case with three ranks was judged.",))


def averaging() -> Report:
    """A mean of micro-batch means, in a tokenizer with hostile tokens."""
    mean = Finding("micro-batch-mean", "fault", "token weights run from 0.32 to 6.12 of the ideal")
    cases = [judged(CASES[0], token_mean)]
    cases += [judged(c, mean_of_means, mean, objective="micro-batch-mean") for c in CASES[1:]]
    step = cases[0].steps[0]
    row = step.sequences[0]
    tokens = (*row.tokens[:-1], replace(row.tokens[-1], text=HOSTILE))
    hostile = replace(step, sequences=(replace(row, tokens=tokens), *step.sequences[1:]))
    cases[0] = replace(cases[0], steps=(hostile,))
    said = ("The weights are a mean of micro-batch means.", "Short responses are over-weighted.")
    return a_report(cases, AuditVerdict("finding", "micro-batch-mean", "token-mean", said, "Count the tokens first."))


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.text = ""
        self.source = ""
        self.figures: dict[str, Any] = {}
        self._inside = ""

    @classmethod
    def of(cls, report: Report) -> Page:
        page = cls()
        page.source = render_page(report)
        page.feed(page.source)
        page.figures = json.loads(page.scripts[0])
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            (self.scripts if self._inside == "script" else self.styles).append(data)
        else:
            self.text += data

    def cells(self, row: int) -> list[str]:
        """Classes of the cells of a row of the heat map, in order."""
        part = self.source.split(f'data-row="{row}"')[1].split('data-row="')[0].split("</section>")[0]
        return [kind.split()[0] for kind in re.findall(r'<i class="([^"]+)"></i>', part)]
