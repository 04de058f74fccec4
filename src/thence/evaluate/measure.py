"""Sampling and grading responses, which evaluation and RL share, and the table row that evaluation makes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from thence.data.order import stable_seed
from thence.data.response import response_text
from thence.data.trajectory import Prompt, Trajectory
from thence.evaluate.metrics import avg_at_k, mean_reward_of
from thence.files import finite
from thence.rollout.native import Response, Sampling, sample
from thence.train.parallel import Ranks
from thence.verify.grader import Grader


class Engine(Protocol):
    """Samples responses elsewhere, with the words of :func:`thence.rollout.native.sample`."""

    def sample(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling) -> list[Response]:
        """One response for every prompt."""
        ...


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


def respond(
    model: Any,
    tokenizer: Any,
    grader: Grader | None,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    seed_parts: tuple[object, ...],
    engine: Engine | None = None,
    again: Sequence[int] | None = None,
) -> list[Trajectory]:
    """``n`` responses for each prompt, prompt by prompt, graded if there is a grader.

    Args:
        seed_parts: what the random numbers follow from, besides the prompt's index and the number of the response.
        engine: samples in place of the model's own process, and holds the same weights.
        again: how often each prompt was drawn before, one number a prompt; default: how often it stands before in
            ``prompts``. A prompt drawn twice is sampled anew.
    """
    repeated = [prompt for prompt in prompts for _ in range(n)]
    seeds = []
    for prompt, times in zip(prompts, times_before(prompts) if again is None else again, strict=True):
        parts = (*seed_parts, times) if times else seed_parts
        seeds += [stable_seed(*parts, prompt.index, j) for j in range(n)]
    token_ids = [prompt.token_ids for prompt in repeated]
    responses = engine.sample(token_ids, seeds, sampling) if engine else sample(model, token_ids, seeds, sampling)
    found = [
        Trajectory(prompt, tuple(r.token_ids), finish=r.finish, sampler_logps=tuple(r.logps))
        for prompt, r in zip(repeated, responses, strict=True)
    ]
    return found if grader is None else grade(tokenizer, grader, found, sampling.stop_ids)


def times_before(prompts: Sequence[Prompt]) -> list[int]:
    """How often each prompt stands before, by its index."""
    times: Counter[int] = Counter()
    result = []
    for prompt in prompts:
        result.append(times[prompt.index])
        times[prompt.index] += 1
    return result


def grade(
    tokenizer: Any, grader: Grader, trajectories: Sequence[Trajectory], stop_ids: Sequence[int]
) -> list[Trajectory]:
    """The same trajectories with text, score and verdict.

    Args:
        stop_ids: all tokens that end a response; the one at its end is no part of the text.
    """
    texts = [response_text(tokenizer, t.response_ids, stop_ids, t.prompt.opening) for t in trajectories]
    grades = grader.grade_many([t.prompt.text for t in trajectories], texts, [t.prompt.answer for t in trajectories])
    return [
        replace(
            trajectory,
            score=grade.score,
            verdict=grade.verdict.value,
            text=text,
            extracted=grade.extracted,
            reason=grade.reason,
        )
        for trajectory, text, grade in zip(trajectories, texts, grades, strict=True)
    ]


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
