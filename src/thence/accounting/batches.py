"""Tokens and FLOPs of an RL stage, from what a rollout batch of its method samples and trains."""

from __future__ import annotations

from dataclasses import dataclass

from thence.accounting.flops import Counts, causal_pairs, forward_flops, rule_flops, sampling_flops, training_flops
from thence.accounting.work import Outcome
from thence.recipe import Rl


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean lengths in tokens: of prompts, of responses, and of demonstrations."""

    prompt: float
    response: float
    shown: float


@dataclass(frozen=True, slots=True)
class Scored:
    """Who reads rows beside the policy in training.

    Args:
        passes: how often the policy of before, and a reference model, read every row.
        taught: whether a teacher scores every response, after a solution as long as it.
    """

    passes: int = 1
    taught: bool = False


Figures = tuple[float, float, float | None, float | None]
"""Tokens trained, tokens generated, FLOPs by the rule and exact ones; None where the model is not known."""


def stage_figures(
    outcome: Outcome, rl: Rl, lengths: Lengths, counts: Counts | None, adapters: int, scored: Scored
) -> Figures:
    """The figures of a stage whose rollout batches all have this outcome."""
    sampled, own, others = (rl.steps * part for part in (outcome.sampled, outcome.trained, outcome.demonstrations))
    prompt, response, shown = lengths.prompt, lengths.response, lengths.shown
    trained, generated = own * response + others * shown, sampled * response
    if counts is None:
        return trained, generated, None, None
    tokens = trained + (own + others) * prompt
    pairs = own * causal_pairs(prompt + response) + others * causal_pairs(prompt + shown)
    rule = rule_flops(counts.total, trained, generated)
    exact = sampled * sampling_flops(counts, prompt, response)
    exact += scored.passes * forward_flops(counts, tokens, pairs, trained)
    exact += training_flops(counts, tokens, pairs, trained, rl.activation_checkpointing, adapters)
    if scored.taught:
        read = prompt + 2 * response
        rule += rule_flops(counts.total, 0, scored=generated)
        exact += forward_flops(counts, sampled * read, sampled * causal_pairs(read), generated)
    return trained, generated, rule, exact


def said(outcomes: tuple[Outcome, Outcome], part: str) -> str:
    """A part of two outcomes, for people: one number, or from the smaller to the larger."""
    low, high = sorted(getattr(outcome, part) for outcome in outcomes)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
