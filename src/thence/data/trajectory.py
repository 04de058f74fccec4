"""A prompt with a response: where it came from, what it was worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Origin = Literal["rollout", "demonstration", "replay"]
Said = tuple[Literal["policy", "environment"], str]
"""Who said what in a rollout of several turns."""


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
        source: where it was read, for messages; empty: its index says it.
        asked: its token ids as they were before an environment's first observation was put behind them; None: nothing
            was.
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
    source: str = ""
    asked: tuple[int, ...] | None = None
    draw: int = 0

    @property
    def without_observation(self) -> Prompt:
        """The prompt of the data. An environment's first observation is of one rollout, and no other may read it."""
        return self if self.asked is None else replace(self, token_ids=self.asked, asked=None)

    @property
    def group_key(self) -> tuple[int, int]:
        """What tells its group from others."""
        return self.index, self.draw


@dataclass(frozen=True)
class Observation:
    """What an environment said between two turns of the policy. It is context: the policy reads it, no step trains it.

    Args:
        after: tokens of the response that stand before it.
        token_ids: as the policy reads it, with what closes the turn before it and opens the next one.
    """

    after: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Trajectory:
    """A prompt and one response, of one turn or of several.

    Args:
        prompt: what was asked.
        response_ids: the response, with its end token if it came. Of several turns: the tokens that the policy wrote in
            all of them, each turn with its end token.
        origin: sampled from the policy, written by the expert, or sampled from an earlier policy.
        score: what the reward function gave; None where nobody can tell (a time-out, a reward of None), or where
            nothing was graded. It is never 0 in place of an unknown one, unless the recipe asks for that.
        verdict: right, wrong or unknown.
        finish: stop or length. Of a rollout in an environment also turns, context, timeout or error: see
            :mod:`thence.rollout.turns`.
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
        versions: where weights of more than one version sampled it (``rl.partial``): of each in turn the version, and
            how many tokens. Empty: those of one version sampled all of it.
        observations: what an environment said between the turns, in order. They lie between the response's tokens in
            the row that the model reads, and are no part of the response.
        transcript: who said what, in order, for the reader; empty where there was no environment.
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
    versions: tuple[tuple[int, int], ...] = ()
    observations: tuple[Observation, ...] = ()
    transcript: tuple[Said, ...] = ()

    @property
    def turns(self) -> int:
        """How often the policy had its turn."""
        return sum(who == "policy" for who, _ in self.transcript) if self.transcript else 1

    @property
    def observation_tokens(self) -> int:
        """Tokens between its turns that the policy read and did not write."""
        return sum(len(observation.token_ids) for observation in self.observations)

    def after_prompt(self) -> tuple[list[int], list[bool]]:
        """The tokens of the row after the prompt, observations between the turns, and which the policy wrote."""
        ids: list[int] = []
        written: list[bool] = []
        at = 0
        for end, read in [*((o.after, o.token_ids) for o in self.observations), (len(self.response_ids), ())]:
            ids += [*self.response_ids[at:end], *read]
            written += [True] * (end - at) + [False] * len(read)
            at = end
        return ids, written

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
