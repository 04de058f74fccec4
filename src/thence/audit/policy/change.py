"""What a hypothesis is, and the plain ways to make one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.observed import Variant
from thence.audit.policy.predict import trained_tokens

Change = Callable[[Variant], Variant]


@dataclass(frozen=True)
class Hypothesis:
    """One change of what was asked for.

    Args:
        finding: id of what it is called.
        part: the part of the objective that it changes: that part is verified where no such change fits.
        detail: the change in words.
        change: of the variant of any step.
    """

    finding: str
    part: str
    detail: str
    change: Change


def setting(finding: str, part: str, detail: str, **settings: Any) -> Hypothesis:
    """The hypothesis that some settings are other ones."""
    return Hypothesis(finding, part, detail, lambda v: replace(v, asked=replace(v.asked, **settings)))


def on_step(finding: str, part: str, detail: str, change: Callable[[PolicyStep], PolicyStep]) -> Hypothesis:
    """The hypothesis that a step has other facts."""
    return Hypothesis(finding, part, detail, lambda v: replace(v, step=change(v.step)))


def overridden(finding: str, part: str, detail: str, made: Callable[[Variant], dict[str, Any]]) -> Hypothesis:
    """The hypothesis that something is so that no setting says."""
    return Hypothesis(finding, part, detail, lambda v: replace(v, other=replace(v.other, **made(v))))


def whole_tokens(variant: Variant) -> np.ndarray:
    """The tokens that are to be trained, shape (T,)."""
    if variant.other.trained is not None:
        return variant.other.trained
    return trained_tokens(variant.step, variant.asked)
