"""The page of an evaluation: one HTML file that needs nothing else. Its numbers are those of results.json."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from thence.evaluate.show import degree, degree_ends, ends, notes, percent
from thence.evaluate.store import GradeLine, Sample, Store
from thence.evaluate.summary import Result, TaskResult
from thence.files import write_atomically
from thence.redaction import redacted, redacted_values
from thence.report.samples import VERDICTS, shown, visible
from thence.stats.spread import Score
from thence.toml import to_toml

EACH = 3
_LABELS = {
    "model": "model",
    "weights": "weights (fingerprint)",
    "parameters": "parameters",
    "dtype": "dtype",
    "endpoint": "server",
    "context": "context, tokens",
    "thence": "thence",
    "git_commit": "git commit",
    "python": "Python",
    "torch": "torch",
    "transformers": "transformers",
    "vllm": "vLLM",
    "platform": "platform",
    "cpu": "CPU",
    "threads": "threads",
    "device": "device",
    "started": "started",
}


def write_evaluation_page(store: Store, result: Result) -> Path:
    """Write ``report.html`` into an evaluation's folder, finished or not, and return its path."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_file("evaluation.html"))
    settings = result.settings
    text = template.render(
        style=_file("page.html").partition("<style>")[2].partition("</style>")[0],
        title=visible(f"{settings.model} on {settings.suite}"),
        stage=visible(settings.stage or ""),
        notes=[visible(note) for note in notes(result)],
        rows=[_row(row) for row in result.tasks],
        groups=[{"name": visible(group.name), "avg": _score(group.score)} for group in result.groups],
        several=any(row.task.samples > 1 for row in result.tasks),
        degrees=any(row.graded for row in result.tasks),
        lenient=any(row.lenient is not None for row in result.tasks),
        unanswered=[one for row in result.tasks for one in _unanswered(store, row)],
        chart=[_bar(row.task.title or row.task.name, row.avg) for row in result.tasks if row.avg is not None]
        + [_bar(f"{group.name} mean", group.score) for group in result.groups],
        samples=[(visible(row.task.title or row.task.name), list(_picked(store, row))) for row in result.tasks],
        command=visible(redacted(str(result.environment.get("command") or ""))),
        environment=[
            (label, visible(str(result.environment[key])))
            for key, label in _LABELS.items()
            if result.environment.get(key) not in (None, "")
        ],
        settings=visible(to_toml(redacted_values(settings.model_dump(mode="json", exclude_none=True)))),
    )
    page = store.folder / "report.html"
    write_atomically(page, text)
    return page


def _file(name: str) -> str:
    return (resources.files("thence.report") / name).read_text(encoding="utf-8")


def _row(row: TaskResult) -> dict[str, Any]:
    problems = f"{len(row.shares):,}"
    if len(row.shares) != row.expected:
        problems += f" of {row.expected:,}"
    k = row.task.samples
    return {
        "name": visible(row.task.title or row.task.name),
        "group": visible(row.task.group),
        "problems": problems,
        "unanswered": f"{len(row.not_answered):,}",
        "k": k,
        "avg": _score(row.avg) if row.reward is None else _degree(row.reward),
        "passed": _score(row.passed.get(k) if k > 1 else None),
        "majority": _score(row.majority),
        "lenient": _score(row.lenient),
        "right": f"{row.right:,}",
        "wrong": f"{row.wrong:,}",
        "graded": f"{row.graded:,}",
        "unknown": f"{row.unknown:,}",
        "truncated": f"{row.truncated:,}",
        "short": f"{row.short:,}",
        "mean_tokens": "–" if row.mean_tokens is None else f"{row.mean_tokens:,.1f}",
    }


def _unanswered(store: Store, row: TaskResult) -> Iterator[dict[str, str]]:
    questions = {refusal.problem: refusal.question for refusal in store.refusals(row.task.name).values()}
    for key, reason in row.not_answered.items():
        where = f"{row.task.title or row.task.name}, problem {key[:8]}"
        yield {"where": visible(where), "question": shown(questions[key]), "reason": shown(reason)}


def _score(score: Score | None) -> dict[str, str]:
    if score is None:
        return {"value": "–", "interval": ""}
    return {"value": percent(score), "interval": ends(score)}


def _degree(score: Score) -> dict[str, str]:
    ends = "" if degree_ends(score) == "–" else degree_ends(score)
    return {"value": degree(score), "interval": f"{ends} mean reward".strip()}


def _bar(name: str, score: Score) -> dict[str, Any]:
    """A score as places on an axis from 0 to 100."""
    return {
        "name": visible(name),
        "low": f"{100 * score.low:.2f}",
        "width": f"{100 * (score.high - score.low):.2f}",
        "value": f"{100 * score.value:.2f}",
        "text": f"{100 * score.value:.1f}",
    }


def _picked(store: Store, row: TaskResult) -> Iterator[dict[str, Any]]:
    """The first responses of every verdict: not chosen by hand."""
    grades = store.graded(row.task.name, row.grader)
    kept: dict[str, list[tuple[Sample, GradeLine]]] = {verdict: [] for verdict in VERDICTS}
    for sample in store.samples(row.task.name):
        grade = grades.get(sample.place)
        if grade is not None and len(kept[grade.verdict]) < EACH:
            kept[grade.verdict].append((sample, grade))
    for verdict in VERDICTS:
        for sample, grade in kept[verdict]:
            tokens = "" if sample.tokens is None else f"{sample.tokens:,} tokens"
            yield {
                "verdict": verdict,
                "score": f"{grade.score:.4g}" if verdict == "graded" else "",
                "where": visible(f"problem {sample.problem[:8]}, sample {sample.sample}"),
                "tokens": visible(", ".join(filter(None, [tokens, "cut off" if sample.finish == "length" else ""]))),
                "prompt": shown("\n\n".join(f"[{role}] {content}" for role, content in sample.prompt)),
                "response": shown(sample.text),
                "answer": shown(sample.answer),
                "extracted": shown(grade.extracted),
                "reason": shown(grade.reason),
            }
