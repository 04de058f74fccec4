"""The page of an evaluation. Its numbers are those of results.json."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from thence.evaluate.store import GradeLine, Sample, Store
from thence.evaluate.summary import CUT, Result, TaskResult
from thence.files import write_atomically
from thence.pages.environment import environment_facts
from thence.pages.evaluation.figures import score_figure
from thence.pages.evaluation.tables import results_table
from thence.pages.samples import (
    ENDS,
    ShownSample,
    excerpt,
    first_of_each,
    hold,
    judged_only,
    reward_components,
    shown_turns,
)
from thence.pages.template import render
from thence.redaction import redacted, redacted_values
from thence.toml import to_toml


def write_page(store: Store, result: Result) -> Path:
    """Write ``report.html`` into an evaluation's folder, finished or not, and return its path."""
    page = store.folder / "report.html"
    write_atomically(page, render_page(store, result))
    return page


def render_page(store: Store, result: Result) -> str:
    """The page as HTML."""
    settings = result.settings
    return render(
        "evaluation",
        title=f"{settings.model} on {settings.suite}",
        aside=f"stage {settings.stage}" if settings.stage else "",
        results=results_table(result, whole=True),
        how_to_read=_how_to_read(result),
        unanswered=[one for row in result.tasks for one in _unanswered(store, row)],
        chart=score_figure(result),
        samples=[(_name(row), first_of_each(_graded(store, row))) for row in result.tasks],
        held=hold((row.task.name, judged_only(_graded(store, row))) for row in result.tasks),
        command=redacted(str(result.environment.get("command") or "")),
        environment=environment_facts(result.environment),
        settings=to_toml(redacted_values(settings.model_dump(mode="json", exclude_none=True))),
    )


def _name(row: TaskResult) -> str:
    return row.task.title or row.task.name


def _how_to_read(result: Result) -> str:
    text = (
        "n: problems. avg@k: mean over problems of the share of right answers among k samples. pass@k: at least one of "
        "k is right (unbiased estimate). maj@k: the most frequent answer is right. Never, always: problems of whose "
        "samples none or all are right. Below each score: its 95% interval; "
        "problems are its unit, so it speaks of the choice of problems. A mean over a group counts every task alike. "
        "Right, wrong, unknown: counts of responses; unknown means that the checker could not decide, and counts as "
        "not right. "
    )
    if any(row.graded for row in result.tasks):
        text += (
            "Graded: the grader gave a degree and states no score from which a response is right; such a task shows "
            "its mean reward, on the grader's own scale. "
        )
    text += "Cut: ended by the limit of tokens or of the context. Tokens: mean length of a response."
    if any(row.lenient is not None for row in result.tasks):
        text += " Lenient: any way to name the right letter counts; a second look, not the score."
    return text


def _unanswered(store: Store, row: TaskResult) -> Iterator[dict[str, str]]:
    questions = {refusal.problem: refusal.question for refusal in store.refusals(row.task.name).values()}
    for key, reason in row.not_answered.items():
        where = f"{_name(row)}, problem {key[:8]}"
        yield {"where": where, "question": excerpt(questions[key]), "reason": excerpt(reason)}


def _graded(store: Store, row: TaskResult) -> Iterator[tuple[str, Any]]:
    grades = store.graded(row.task.name, row.grader)
    for line in store.samples(row.task.name):
        if line.place in grades:
            yield grades[line.place].verdict, partial(_sample, row, line, grades[line.place])


def _end(line: Sample) -> str:
    if line.finish in CUT:
        return "cut off"
    return ENDS.get(line.finish, "") if line.turns else ""


def _sample(row: TaskResult, line: Sample, grade: GradeLine) -> ShownSample:
    tokens = "" if line.tokens is None else f"{line.tokens:,} tokens"
    return ShownSample(
        verdict=grade.verdict,
        score=f"{grade.score:.4g}" if grade.verdict == "graded" else "",
        where=f"problem {line.problem[:8]}, sample {line.sample}",
        tokens=", ".join(filter(None, [tokens, _end(line)])),
        prompt=excerpt("\n\n".join(f"[{role}] {content}" for role, content in line.prompt)),
        response=excerpt(line.text),
        answer=excerpt(line.answer),
        extracted=excerpt(grade.extracted),
        reason=excerpt(grade.reason),
        group=_name(row),
        reward=grade.score,
        length=line.tokens,
        components=reward_components(grade.components),
        turns=shown_turns(line.turns),
    )
