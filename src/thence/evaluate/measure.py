"""Measuring a model on a test set: one row of a result table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thence.data.trajectory import Prompt, Trajectory
from thence.evaluate.metrics import avg_at_k, mean_reward_of
from thence.files import finite
from thence.rollout.native import Sampling
from thence.rollout.responses import respond
from thence.train.parallel import Ranks
from thence.verify.grader import Grader


@dataclass(frozen=True)
class Measurement:
    """One row of a result table: a test set at a temperature.

    Args:
        split: name of the test set.
        temperature: of sampling.
        problems, samples: how many problems, and samples for each.
        accuracy, low, high: avg@samples and its 95% interval; None where a score is a degree without a threshold.
        right, wrong, unknown: verdicts over all samples; unknown is counted as not right.
        mean_tokens: mean length of a response.
        truncated: responses without an end token.
        graded: scores that are a degree and neither right nor wrong.
        reward, reward_low, reward_high: mean score of the responses that have one and its 95% interval; None: none has.
    """

    split: str
    temperature: float
    problems: int
    samples: int
    accuracy: float | None
    low: float | None
    high: float | None
    right: int
    wrong: int
    unknown: int
    mean_tokens: float
    truncated: int
    graded: int = 0
    reward: float | None = None
    reward_low: float | None = None
    reward_high: float | None = None


def measure(
    model: Any,
    tokenizer: Any,
    grader: Grader,
    prompts: Sequence[Prompt],
    *,
    split: str,
    samples: int,
    sampling: Sampling,
    seed_parts: tuple[object, ...],
    ranks: Ranks,
) -> tuple[Measurement, list[Trajectory]]:
    """Accuracy or mean reward on a test set, and all responses. Ranks share the problems; each gets it all."""
    mine = prompts[ranks.rank :: ranks.world]
    parts = ranks.gather(respond(model, tokenizer, grader, mine, samples, sampling, seed_parts))
    place = {prompt.index: i for i, prompt in enumerate(prompts)}
    trajectories = sorted((t for part in parts for t in part), key=lambda t: place[t.prompt.index])
    groups = [trajectories[i : i + samples] for i in range(0, len(trajectories), samples)]
    verdicts = [t.verdict for t in trajectories]
    graded = verdicts.count("graded")
    result = None if graded else avg_at_k([sum(t.verdict == "right" for t in g) for g in groups], samples)
    scores = [[t.score for t in g if t.score is not None and t.verdict != "unknown"] for g in groups]
    level = mean_reward_of(scores, samples) if any(scores) else None
    row = Measurement(
        split=split,
        temperature=sampling.temperature,
        problems=len(groups),
        samples=samples,
        accuracy=None if result is None else result.value,
        low=None if result is None else result.low,
        high=None if result is None else result.high,
        right=verdicts.count("right"),
        wrong=verdicts.count("wrong"),
        unknown=verdicts.count("unknown"),
        mean_tokens=sum(len(t.response_ids) for t in trajectories) / len(trajectories),
        truncated=sum(t.finish == "length" for t in trajectories),
        graded=graded,
        reward=None if level is None else level.value,
        reward_low=None if level is None else finite(level.low),
        reward_high=None if level is None else finite(level.high),
    )
    return row, trajectories


def sample_record(trajectory: Trajectory, **where: Any) -> dict[str, Any]:
    """A response as plain values, for ``samples.jsonl``."""
    return {
        **where,
        "index": trajectory.prompt.index,
        "prompt": trajectory.prompt.text,
        "response": trajectory.text,
        "answer": trajectory.prompt.answer,
        "verdict": trajectory.verdict,
        "extracted": trajectory.extracted,
        "reason": trajectory.reason,
        "score": trajectory.score,
        "tokens": len(trajectory.response_ids),
        "finish": trajectory.finish,
    }


def measurement_record(row: Measurement) -> dict[str, Any]:
    """A table row as plain values, for ``result.json``."""
    return asdict(row)
