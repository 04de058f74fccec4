"""Tokens and FLOPs of an RL stage, from what a rollout batch of its method samples and trains."""

from __future__ import annotations

from dataclasses import dataclass

from thence.accounting.flops import Counts, causal_pairs, forward_flops, rule_flops, sampling_flops, training_flops
from thence.accounting.planned import Executed
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
    trained, generated = own * response + others * shown, sampled * response
    if counts is None:
        return Figures(trained, generated, sampled)
    tokens = trained + (own + others) * prompt
    pairs = own * causal_pairs(prompt + response) + others * causal_pairs(prompt + shown)
    rule = rule_flops(counts.total, trained, generated)
    scoring = scored.passes * forward_flops(counts, tokens, pairs, trained)
    if scored.taught:
        read = prompt + 2 * response
        rule += rule_flops(counts.total, 0, scored=generated)
        scoring += forward_flops(counts, sampled * read, sampled * causal_pairs(read), generated)
    executed = Executed(
        training_flops(counts, tokens, pairs, trained, rl.activation_checkpointing, adapters),
        scoring,
        group_flops(counts, prompt, response, sampled, rl.rollouts),
    )
    return Figures(trained, generated, sampled, rule, executed)


def group_flops(counts: Counts, prompt: float, response: float, responses: float, group: int) -> float:
    """Responses to prompts of which each has ``group`` of them; a prompt is read once for all of its own."""
    repeated = responses * (1 - 1 / group)
    return responses * sampling_flops(counts, prompt, response) - repeated * forward_flops(
        counts, prompt, causal_pairs(prompt), 1
    )


def said(outcomes: tuple[Outcome, Outcome], part: str) -> str:
    """A part of two outcomes, for people: one number, or from the smaller to the larger."""
    low, high = sorted(getattr(outcome, part) for outcome in outcomes)
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"
