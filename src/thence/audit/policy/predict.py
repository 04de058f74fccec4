"""The weight that a policy objective gives to every response token of a step, in closed form.

A weight w_t is the factor of the gradient of the token's negative log-probability in the gradient of the loss, as
everywhere in the audit. So a token with advantage A and ratio one has weight n_i A, and a KL term of slope s has
-n_i kl s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thence.audit.objectives import OBJECTIVES
from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.objective import PolicyObjective

LIMIT = 50.0
"""Log-ratios are held within it, so that an exponential is finite; every trainer's own limit is lower."""


def token_weights(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """Weights of the response tokens under an objective, shape (T,)."""
    advantage = row_advantages(step, asked)
    trained = trained_tokens(step, asked)
    counted = trained & np.isin(step.row, np.flatnonzero(advantage != 0)) if asked.counted == "informative" else trained
    rows = step.counted(counted, asked.longest)
    normal = OBJECTIVES[asked.normaliser].weights(rows)[step.row]
    acting = advantage[step.row] * surrogate_slope(step, asked, advantage, trained) * correction(step, asked, trained)
    if asked.kl and asked.kl_in == "loss":
        acting = acting - asked.kl * kl_slope(step.logp - step.reference, asked.estimator)
    return np.where(trained, normal * acting, 0.0)


def trained_tokens(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """Which tokens are trained, shape (T,), bool."""
    trained = ~step.environment()
    return trained & ~step.truncated()[step.row] if asked.truncated == "mask" else trained


def row_advantages(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """Advantage of every row, shape (S,).

    A KL in the reward needs the log-probabilities of all rows of the generation batch, so it is taken from the rows
    of this step alone: a step must then hold its generation batches whole.
    """
    taken = np.zeros(len(step.rollouts))
    if asked.kl and asked.kl_in == "reward":
        written = np.where(step.environment(), 0.0, kl_value(step.old - step.reference, asked.estimator))
        taken[step.example] = asked.kl * step.sums(written)
    return np.array(advantages(step.rollouts, asked, taken))[step.example]


def advantages(rollouts: Sequence[Rollout], asked: PolicyObjective, taken: np.ndarray) -> list[float]:
    """Advantage of every rollout.

    Args:
        taken: subtracted from each reward, shape (rollouts,).
    """
    reward = np.array([rollout.reward for rollout in rollouts]) - taken
    batch = np.array([rollout.batch for rollout in rollouts])
    group = np.array([rollout.group for rollout in rollouts])
    result = []
    for i in range(len(rollouts)):
        mine = (group == group[i]) & (batch == batch[i])
        whole = batch == batch[i]
        others = mine & (np.arange(len(rollouts)) != i)
        base = {"group": mine, "batch": whole, "leave-one-out": others, "none": np.zeros_like(mine)}[asked.baseline]
        value = reward[i] - (reward[base].mean() if base.any() else 0.0)
        if asked.scale != "none":
            over = reward[mine if asked.scale == "group" else whole]
            spread = over.std(ddof=1) if asked.bessel and len(over) > 1 else over.std()
            value /= spread + asked.eps
        result.append(float(value))
    return result


def surrogate_slope(step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Derivative of the surrogate by log pi over the advantage, shape (T,): the ratio where it acts, else zero."""
    if asked.ratio == "none":
        return np.ones(len(step.row))
    log_ratio = step.logp - step.old
    if asked.ratio == "sequence":
        lengths = np.maximum(np.bincount(step.row[trained], minlength=step.rows), 1)
        log_ratio = (step.sums(np.where(trained, log_ratio, 0.0)) / lengths)[step.row]
    ratio = np.exp(np.clip(log_ratio, -LIMIT, LIMIT))
    low, high = 1 - asked.clip_low, 1 + asked.clip_high
    if asked.surrogate == "weight":
        return np.clip(ratio, low, high)
    held = np.where(advantage[step.row] >= 0, ratio > high, (ratio < low) | (ratio > asked.dual_clip))
    return np.where(held, 0.0, ratio)


def correction(step: PolicyStep, asked: PolicyObjective, trained: np.ndarray) -> np.ndarray:
    """Factor for the difference between trainer and sampling engine, shape (T,)."""
    if asked.correction == "none":
        return np.ones(len(step.row))
    log_ratio = np.where(trained, step.old - step.sampler, 0.0)
    if asked.correction_level == "sequence":
        log_ratio = step.sums(log_ratio)[step.row]
    ratio = np.exp(np.clip(log_ratio, -LIMIT, LIMIT))
    if asked.correction == "truncate":
        return np.clip(ratio, asked.correction_floor, asked.correction_cap)
    return np.where((ratio > asked.correction_cap) | (ratio < asked.correction_floor), 0.0, ratio)


def kl_value(difference: np.ndarray, estimator: str) -> np.ndarray:
    """An estimator of the KL from d = log pi - log pi_ref, shape (T,)."""
    if estimator == "k1":
        return difference
    return difference**2 / 2 if estimator == "k2" else np.exp(-difference) - 1 + difference


def kl_slope(difference: np.ndarray, estimator: str) -> np.ndarray:
    """Its derivative by log pi, shape (T,)."""
    if estimator == "k1":
        return np.ones_like(difference)
    return difference if estimator == "k2" else 1 - np.exp(-difference)
