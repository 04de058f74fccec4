"""Tokens and FLOPs of an RL stage, from what a rollout batch of its method samples and trains."""

from __future__ import annotations

from dataclasses import dataclass

from thence.accounting.flops import Counts, causal_pairs, forward_flops, rule_flops, sampling_flops, training_flops
from thence.accounting.planned import Executed
from thence.accounting.work import Outcome
from thence.recipe import Rl


@dataclass(frozen=True, slots=True)
class Turns:
    """Mean number of turns in a rollout, and mean tokens of all its observations together, which are equally long."""

    number: float = 1.0
    observed: float = 0.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean lengths in tokens: of prompts, of responses over all turns, and of demonstrations."""

    prompt: float
    response: float
    shown: float
    turns: Turns = Turns()


@dataclass(frozen=True, slots=True)
class Scored:
    """Who reads rows beside the policy in training.

    Args:
        passes: how often the policy without gradient, and a reference model, read every row.
        taught: whether a teacher scores every response, after a solution as long as it.
    """

    passes: float = 1
    taught: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """Tokens trained, tokens generated, responses, FLOPs by the rule and exact ones; None: the model is not known."""

    trained: float
    generated: float
    responses: float
    rule: float | None = None
    executed: Executed | None = None


def stage_figures(
    outcome: Outcome, rl: Rl, lengths: Lengths, counts: Counts | None, adapters: int, scored: Scored
) -> Figures:
    """The figures of a stage whose rollout batches all have this outcome."""
    sampled, own, others = (rl.steps * part for part in (outcome.sampled, outcome.trained, outcome.demonstrations))
    prompt, response, shown = lengths.prompt, lengths.response, lengths.shown
    row = prompt + response + lengths.turns.observed
    trained, generated = own * response + others * shown, sampled * response
    if counts is None:
        return Figures(trained, generated, sampled)
    tokens = own * row + others * (prompt + shown)
    pairs = own * causal_pairs(row) + others * causal_pairs(prompt + shown)
    rule = rule_flops(counts.total, trained, generated)
    scoring = scored.passes * forward_flops(counts, tokens, pairs, trained)
    if scored.taught:
        read = row + response
        rule += rule_flops(counts.total, 0, scored=generated)
        scoring += forward_flops(counts, sampled * read, sampled * causal_pairs(read), generated)
    executed = Executed(
        training_flops(counts, tokens, pairs, trained, rl.activation_checkpointing, adapters),
        scoring,
        group_flops(counts, lengths, sampled, rl.rollouts),
    )
    return Figures(trained, generated, sampled, rule, executed)


def group_flops(counts: Counts, lengths: Lengths, responses: float, group: int) -> float:
    """Responses to prompts of which each has ``group`` of them; a prompt is read once for all of its own.

    Every turn after the first reads its own row from the start. A broken number of turns is between its neighbours.
    """
    prompt, turns = lengths.prompt, lengths.turns
    low, part = int(turns.number), turns.number % 1
    each = (1 - part) * _rollout_flops(counts, lengths, low)
    if part:
        each += part * _rollout_flops(counts, lengths, low + 1)
    repeated = responses * (1 - 1 / group)
    return responses * each - repeated * forward_flops(counts, prompt, causal_pairs(prompt), 1)


def _rollout_flops(counts: Counts, lengths: Lengths, turns: int) -> float:
    said, observed = lengths.response / turns, lengths.turns.observed / max(1, turns - 1)
    return sum(sampling_flops(counts, lengths.prompt + i * (said + observed), said) for i in range(turns))


def said(outcomes: tuple[Outcome, Outcome], part: str) -> str:
    """A part of two outcomes, for people: one number, or from the smaller to the larger."""
    low, high = sorted(getattr(outcome, part) for outcome in outcomes)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
