"""A prompt with a response: where it came from, what it was worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Origin = Literal["rollout", "demonstration", "replay"]


@dataclass(frozen=True)
class Prompt:
    """An example made ready for a model.

    Args:
        index: its place in the data set.
        token_ids: the prompt, with the beginning of the response's turn.
        demonstration_ids: the expert response with its end token, where there is one.
        answer: what the grader compares with, where there is one.
        text: the prompt as the user wrote it, for graders and reports.
        group: the set it belongs to, for tables.
        opening: the think tag that the tokens end with ("<think>\\n"), put back before a response is graded; else "".
        columns: what else the row holds, a JSON object as text, for reward functions; empty: nothing.
        draw: its place in the rollout batch of all ranks. Two draws of one prompt are two groups, and a batch is cut
            into optimizer steps in the order of the draws.
    """

    index: int
    token_ids: tuple[int, ...]
    demonstration_ids: tuple[int, ...] | None = None
    answer: str | None = None
    text: str = ""
    group: str = ""
    opening: str = ""
    columns: str = ""
    draw: int = 0

    @property
    def group_key(self) -> tuple[int, int]:
        """What tells its group from others."""
        return self.index, self.draw


@dataclass(frozen=True)
class Trajectory:
    """A prompt and one response.

    Args:
        prompt: what was asked.
        response_ids: the response, with its end token if it came.
        origin: sampled from the policy, written by the expert, or sampled from an earlier policy.
        score: what the reward function gave; None where nobody can tell (a time-out, a reward of None), or where
            nothing was graded. It is never 0 in place of an unknown one, unless the recipe asks for that.
        verdict: right, wrong or unknown.
        finish: stop or length.
        text: the response as graders see it: see `thence.data.response.response_text`.
        sampler_logps: log-probabilities that the sampler reported, to measure its mismatch with the trainer.
        extracted: what the grader took for the answer.
        reason: why the grader could not tell, or what else it has to say.
        components: what the score is made of, by name, where the reward function or several of them say so.
        prefix: first tokens of the response that the expert wrote and the policy went on from.
        behaviour: log-probabilities of a replayed response under the policy that sampled it. None for all others: a
            method finds those of a rollout in ``TokenFacts.old``.
        round: of sampling, from 0, where a method samples a group in rounds, and what a later one asks for follows from
            the rewards of the earlier.
        version: of the weights that sampled it: optimizer updates of whole rollout batches before. None: it was not
            sampled ahead (``rl.ahead``), so they are those of its own step.
    """

    prompt: Prompt
    response_ids: tuple[int, ...]
    origin: Origin = "rollout"
    score: float | None = None
    verdict: str = "unknown"
    finish: str = "stop"
    text: str = ""
    sampler_logps: tuple[float, ...] | None = None
    extracted: str | None = None
    reason: str = ""
    components: tuple[tuple[str, float], ...] = ()
    prefix: int = 0
    behaviour: tuple[float, ...] | None = None
    round: int = 0
    version: int | None = None

    @property
    def sampled_tokens(self) -> int:
        """Tokens that the policy wrote just now."""
        return len(self.response_ids) - self.prefix if self.origin == "rollout" else 0

    def scored(self, score: float | None) -> Trajectory:
        """The same trajectory with another score."""
        return replace(self, score=score)

    def in_round(self, number: int) -> Trajectory:
        """The same trajectory as one of another round of sampling."""
        return replace(self, round=number)
