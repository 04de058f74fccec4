"""What acts on tokens that the policy did not sample just now: demonstrations, prefixes of them, and replays.

As in ``predict.py``, what acts is the derivative of the term by the token's log-probability, before the normaliser.
"""

from __future__ import annotations

import math

import numpy as np

from thence.audit.policy.facts import PolicyStep
from thence.audit.policy.objective import PolicyObjective


def with_others(step: PolicyStep, asked: PolicyObjective, acting: np.ndarray, advantage: np.ndarray) -> np.ndarray:
    """What acts on every token, shape (T,), with demonstrations and replays in place of what ``acting`` says of them.

    Args:
        acting: on tokens that were sampled, shape (T,).
        advantage: of every row, shape (S,).
    """
    shown, replayed = step.demonstrated()[step.row], step.replayed()
    if shown.any():
        acting = np.where(shown, _demonstrations(step, asked, advantage), acting)
    if replayed.any():
        acting = np.where(replayed, advantage[step.row] * _replays(step, asked), acting)
    return acting


def correctness(step: PolicyStep, asked: PolicyObjective) -> tuple[np.ndarray, np.ndarray]:
    """Of responses weighted by right or wrong: a sign of every row, shape (S,), and a weight of every token, (T,)."""
    right = step.rewards() >= 1
    weight = np.where(right[step.row], asked.right_weight * np.exp(confidence(step, asked)), -asked.wrong_weight)
    return np.where(right, 1.0, -1.0), weight


def confidence(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """H at every token, shape (T,); zero where nothing is weighted by it."""
    if asked.confidence == "none":
        return np.zeros(len(step.row))
    if asked.confidence == "token":
        return step.entropy
    if asked.confidence == "batch":
        return np.full(len(step.row), step.entropy.mean())
    lengths = np.maximum(np.bincount(step.row, minlength=step.rows), 1)
    return (step.sums(step.entropy) / lengths)[step.row]


def by_kind(step: PolicyStep, asked: PolicyObjective, normal: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Weight of a token of each row before what acts on it, shape (S,), where kinds of rows have divisors of their own.

    Args:
        normal: where they have none, shape (S,).
    """
    shown = step.demonstrated()
    if asked.demonstration_divisor == "all" or not shown.any():
        return normal
    tokens = step.sums(trained.astype(float))
    own = np.where(shown, 1.0 / max(tokens[shown].sum(), 1.0), normal)
    return own if asked.demonstration_divisor == "own" else np.where(shown, own, 1.0 / max(tokens[~shown].sum(), 1.0))


def prefix_weights(step: PolicyStep, asked: PolicyObjective, acting: np.ndarray, begun: np.ndarray) -> np.ndarray:
    """What acts on tokens of prefixes, shape (T,).

    Args:
        acting: on all tokens, if the policy had written them, shape (T,).
        begun: which tokens are a prefix's, shape (T,), bool.
    """
    if asked.prefix == "likelihood":
        return np.full(len(acting), asked.prefix_weight)
    if asked.prefix == "context":
        return np.zeros(len(acting))
    if asked.prefix == "bounded":
        limited = np.exp(np.minimum(step.logp - np.log(asked.prefix_bound), 0.0)) if asked.prefix_bound else 1.0
        return np.where(step.repeated(), 0.0, asked.prefix_weight * limited)
    return np.where(kept(step, asked, begun), acting, 0.0)


def kept(step: PolicyStep, asked: PolicyObjective, begun: np.ndarray) -> np.ndarray:
    """Which prefix tokens have one of the highest entropies of the step, shape (T,), bool."""
    found = begun.copy()
    places = np.flatnonzero(begun)
    found[places[np.argsort(step.entropy[places], kind="stable")[: _dropped(asked, len(places))]]] = False
    return found


def near_kept(step: PolicyStep, asked: PolicyObjective, width: float) -> np.ndarray:
    """Prefix tokens of which rounding decides whether their entropy is high enough, shape (T,), bool."""
    begun = step.begun()
    entropies = np.sort(step.entropy[begun])
    last = _dropped(asked, len(entropies))
    if not 0 < last < len(entropies):
        return np.zeros(len(step.row), bool)
    low, high = entropies[last - 1], entropies[last]
    return begun & (high - low < width) & (step.entropy > low - width) & (step.entropy < high + width)


def _dropped(asked: PolicyObjective, tokens: int) -> int:
    return math.floor((1 - asked.prefix_keep) * tokens + 1e-9)


def blends(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """Share of the reference policy's distribution in the target of GIFT, shape (T,): 1 / (1 + p_ref (e^beta - 1))."""
    return 1 / (1 + np.exp(step.reference) * np.expm1(asked.raised_by))


def _replays(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    ratio = np.exp(np.clip(step.logp - step.sampler, -50.0, 50.0))
    if asked.replay == "shape":
        return asked.gamma * ratio / (ratio + asked.gamma) ** 2
    return ratio if asked.replay == "ratio" else np.ones(len(ratio))


def _demonstrations(step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray) -> np.ndarray:
    """What acts on tokens of demonstrations before the normaliser, shape (T,)."""
    p = np.exp(step.logp)
    slope = {
        "likelihood": np.ones_like(p),
        "probability": p,
        "shape": asked.gamma * p / (p + asked.gamma) ** 2,
        "uncertain": p * (1 - p),
        "raised": 1 - blends(step, asked),
    }[asked.demonstration]
    factor = advantage[step.row] if asked.demonstration_advantage else 1.0
    beside = asked.demonstration_likelihood * np.exp(asked.confidence_sign * confidence(step, asked))
    return asked.demonstration_weight * factor * slope + beside
