"""Tokens outside the responses that are trained: prompts, padding, and what a template writes after the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from thence.audit.objectives import OBJECTIVES, StepRows
from thence.audit.policy.change import Hypothesis, whole_tokens
from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective
from thence.audit.policy.observed import Variant

WORDS = {
    "prompt": ("prompt-trained", "tokens of the prompt are trained"),
    "after": ("after-trained", "tokens after the end of a response are trained"),
    "padding": ("padding-trained", "padding is trained"),
}
"""Role -> what it is called where such tokens are trained, and in words."""


def outside_changes(
    steps: Sequence[PolicyStep], asked: PolicyObjective, roles: Sequence[str] = ("prompt", "after")
) -> Iterator[Hypothesis]:
    """Tokens outside the responses have weights, whichever; the normaliser counts them or does not.

    They have no part that could be verified: free weights of nought fit a clean step too.
    """
    for role in roles:
        if not any(step.outside[role].any() for step in steps if role in step.outside):
            continue
        found, detail = WORDS[role]
        for per in (None, role):
            words = detail if per is None else f"{detail}, and counted by the normaliser"
            yield Hypothesis(found, "", words, lambda v, r=role, p=per: _with_role(v, r, p))


def _with_role(variant: Variant, role: str, counted: str | None) -> Variant:
    also = (*variant.also, role)
    if counted is None or counted not in variant.step.outside:
        return replace(variant, also=also)
    step, asked = variant.step, variant.asked
    lengths = np.bincount(step.row[whole_tokens(variant)], minlength=step.rows) + step.outside[counted]
    normal = OBJECTIVES[asked.normaliser].weights(StepRows(lengths, step.micro_batch, step.rank, asked.longest))
    return replace(variant, also=also, other=replace(variant.other, normal=normal))
