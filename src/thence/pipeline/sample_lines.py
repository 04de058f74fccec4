"""Lines of a stage's ``samples.jsonl``: responses as plain values for the reader and for other tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thence.data.trajectory import Prompt, Trajectory
from thence.evaluate.store import GradeLine, Sample


def rollout_line(trajectory: Trajectory, **where: Any) -> dict[str, Any]:
    """The line of a response that a training stage sampled."""
    graded = (trajectory.verdict, trajectory.extracted, trajectory.reason, trajectory.score)
    sampled = (trajectory.text, len(trajectory.response_ids), trajectory.finish)
    line = _line(trajectory.prompt, graded, sampled, where)
    return line | _made_of(dict(trajectory.components)) | _turns(trajectory.transcript)


def evaluation_line(prompt: Prompt, sample: Sample, grade: GradeLine, **where: Any) -> dict[str, Any]:
    """The line of a response that an evaluation stage sampled."""
    graded = (grade.verdict, grade.extracted, grade.reason, grade.score)
    line = _line(prompt, graded, (sample.text, sample.tokens, sample.finish), where)
    return line | _made_of(grade.components) | _turns(sample.turns)


def _turns(said: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Who said what, where there was an environment."""
    return {"turns": [{"who": who, "text": text} for who, text in said]} if said else {}


def _made_of(components: dict[str, float] | None) -> dict[str, Any]:
    return {"components": components} if components else {}


def _line(prompt: Prompt, graded: tuple[Any, ...], sampled: tuple[Any, ...], where: dict[str, Any]) -> dict[str, Any]:
    verdict, extracted, reason, score = graded
    text, tokens, finish = sampled
    return {
        **where,
        "index": prompt.index,
        "prompt": prompt.text,
        "response": text,
        "answer": prompt.answer,
        "verdict": verdict,
        "extracted": extracted,
        "reason": reason,
        "score": score,
        "tokens": tokens,
        "finish": finish,
    }
