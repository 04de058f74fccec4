"""The weight that a policy objective gives to every response token of a step, in closed form.

A weight w_t is the factor of the gradient of the token's negative log-probability in the gradient of the loss, as
everywhere in the audit. So a token with advantage A and ratio one has weight n_i A, and a KL term of slope s has
-n_i kl s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thence.audit.objectives import OBJECTIVES
from thence.audit.policy.facts import PolicyStep, Rollout
from thence.audit.policy.mixed import blends, by_kind, correctness, near_kept, prefix_weights, with_others
from thence.audit.policy.objective import PolicyObjective

GAMMA_LEAST, GAMMA_MOST = 1e-8, 20.0
"""Bounds of w, and of log w, in VESPO's code."""
MOST_SENSITIVE = 20.0
"""More than that times the usual tolerance would let mistakes pass."""
ROUNDING = 1e-12
"""Advantages below this share of the largest reward are rounding."""
LIMIT = 50.0
"""Log-ratios are held within it, so that an exponential is finite; every trainer's own limit is lower."""


@dataclass(frozen=True)
class Overrides:
    """What no setting says, to predict the step of a mistake; None: as the objective has it.

    Args:
        trained, counted: tokens that are trained, and that the normaliser counts, shape (T,), bool.
        advantage: of every row, shape (S,).
        normal: weight of a token of each row before its advantage, shape (S,).
    """

    trained: np.ndarray | None = None
    counted: np.ndarray | None = None
    advantage: np.ndarray | None = None
    normal: np.ndarray | None = None


def token_weights(step: PolicyStep, asked: PolicyObjective, other: Overrides | None = None) -> np.ndarray:
    """Weights of the response tokens under an objective, shape (T,)."""
    other = other or Overrides()
    advantage = row_advantages(step, asked, other)
    trained = trained_tokens(step, asked) if other.trained is None else other.trained
    corrected = correction(step, asked, trained)
    if asked.surrogate == "gamma":
        corrected = np.ones(len(step.row))  # part of w
    if asked.ratio == "sequence" and asked.surrogate not in ("weight", "gamma"):
        # The gradient of a response's ratio reaches all its tokens alike, whichever of them is corrected.
        lengths = np.maximum(step.sums(trained.astype(float)), 1)
        corrected = (step.sums(np.where(trained, corrected, 0.0)) / lengths)[step.row]
    factor = advantage[step.row]
    if asked.own == "correctness":
        advantage, factor = correctness(step, asked)
    elif asked.own == "teacher":
        factor = step.gap_to_teacher() if asked.divergence == "none" else np.zeros(len(step.row))
    acting = factor * surrogate_slope(step, asked, advantage, trained) * corrected
    acting = with_others(step, asked, asked.own_weight * acting, row_advantages(step, asked, other))
    begun = step.begun() if asked.prefix != "train" else np.zeros(len(step.row), bool)
    if begun.any():
        acting = np.where(begun, prefix_weights(step, asked, acting, begun), acting)
    if asked.kl and asked.kl_in == "loss" and not asked.exact:
        apart = step.logp - step.reference
        slope = kl_slope(apart, asked.estimator)
        if asked.kl_ratio:
            slope = np.exp(log_ratios(step, asked, trained)) * (slope + kl_value(apart, asked.estimator))
        acting = acting - asked.kl * np.where(begun, 0.0, slope)
    if asked.pull:
        acting = acting - 2 * asked.pull * (step.logp - step.old)
    normal = by_kind(step, asked, normals(step, asked, other), trained)[step.row]
    if asked.prefix == "likelihood":
        normal = np.where(begun, 1.0 / max((begun & trained).sum(), 1), normal)
    return np.where(trained, normal * acting, 0.0)


def beside_weights(
    step: PolicyStep, asked: PolicyObjective, other: Overrides | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the gradients that a loss may have beside those of the tokens: of the entropy at every token and of
    the exact KL or the divergence there, both of shape (T,)."""
    other = other or Overrides()
    trained = trained_tokens(step, asked) if other.trained is None else other.trained
    normal = np.where(trained, normals(step, asked, other)[step.row], 0.0)
    exact = np.full(len(step.row), asked.kl if asked.exact and asked.kl_in == "loss" else 0.0)
    if asked.demonstration == "raised":
        exact = exact + np.where(step.demonstrated()[step.row], asked.demonstration_weight * blends(step, asked), 0.0)
    if asked.own == "teacher" and asked.divergence != "none":
        held = surrogate_slope(step, asked, row_advantages(step, asked, other), trained)
        exact = exact + np.where(step.taught(), asked.own_weight * held, 0.0)
    own = trained & ~step.begun() if asked.entropy_on != "all" else trained
    bonus = own / max(own.sum(), 1) if asked.entropy_on == "own-mean" else np.where(own, normal, 0.0)
    return -asked.entropy * bonus, exact * normal


def normals(step: PolicyStep, asked: PolicyObjective, other: Overrides) -> np.ndarray:
    """Weight of a token of each row before its advantage, shape (S,)."""
    if other.normal is not None:
        return other.normal
    counted = other.counted
    if counted is None:
        counted = trained_tokens(step, asked) if other.trained is None else other.trained
        if asked.counted == "informative":
            advantage = row_advantages(step, asked, other)
            counted = counted & np.isin(step.row, np.flatnonzero(advantage != 0))
    return OBJECTIVES[asked.normaliser].weights(step.counted(counted, asked.longest))


def trained_tokens(step: PolicyStep, asked: PolicyObjective) -> np.ndarray:
    """Which tokens are trained, shape (T,), bool."""
    trained = ~step.environment()
    return trained & ~step.truncated()[step.row] if asked.truncated == "mask" else trained


def row_advantages(step: PolicyStep, asked: PolicyObjective, other: Overrides | None = None) -> np.ndarray:
    """Advantage of every row, shape (S,).

    A KL in the reward needs the log-probabilities of all rows of the generation batch, so it is taken from the rows
    of this step alone: a step must then hold its generation batches whole.
    """
    if other is not None and other.advantage is not None:
        return other.advantage
    taken = np.zeros(len(step.rollouts))
    if asked.kl and asked.kl_in == "reward":
        written = np.where(step.environment(), 0.0, kl_value(step.old - step.reference, asked.estimator))
        taken[step.example] = asked.kl * step.sums(written)
    return advantages(step.rollouts, asked, taken)[step.example]


def advantages(rollouts: Sequence[Rollout], asked: PolicyObjective, taken: np.ndarray) -> np.ndarray:
    """Advantage of every rollout, shape (rollouts,).

    Args:
        taken: subtracted from each reward, shape (rollouts,).
    """
    reward = np.array([rollout.reward for rollout in rollouts]) - taken
    batch = np.array([rollout.batch for rollout in rollouts])
    group = np.array([rollout.group for rollout in rollouts])
    whole = batch[:, None] == batch
    mine = whole & (group[:, None] == group)
    none = np.zeros_like(mine)
    others = mine & ~np.eye(len(reward), dtype=bool)
    if asked.compared == "own":
        own = np.array([not rollout.demonstration for rollout in rollouts])
        mine, whole = mine & own, whole & own
        others = others & own
    base = {"group": mine, "batch": whole, "leave-one-out": others, "none": none}[asked.baseline]
    value = reward - (base @ reward) / np.maximum(base.sum(1), 1)
    # What rounding leaves of a reward that equals its baseline would be all there is of a step in which nothing acts.
    value = np.where(np.abs(value) < ROUNDING * np.abs(reward).max(initial=0.0), 0.0, value)
    if asked.scale == "none":
        return value
    over = mine if asked.scale == "group" else whole
    size = np.maximum(over.sum(1), 1)
    apart = (reward[None, :] - (over @ reward / size)[:, None]) ** 2
    squares = (apart * over).sum(1)
    freedom = np.where(size > 1, size - 1, 1) if asked.bessel else size
    return value / (np.sqrt(squares / freedom) + asked.eps)


def log_ratios(step: PolicyStep, asked: PolicyObjective, trained: np.ndarray) -> np.ndarray:
    """Log of the ratio that acts on each token, shape (T,)."""
    log_ratio = step.logp - np.where(step.replayed(), step.sampler, step.old)
    if asked.by_response:
        lengths = np.maximum(np.bincount(step.row[trained], minlength=step.rows), 1)
        log_ratio = (step.sums(np.where(trained, log_ratio, 0.0)) / lengths)[step.row]
    return np.clip(log_ratio, -LIMIT, LIMIT)


def surrogate_slope(step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Derivative of the surrogate by log pi over the advantage, shape (T,): the ratio where it acts, else zero."""
    if asked.ratio == "none":
        return np.ones(len(step.row))
    ratio = np.exp(log_ratios(step, asked, trained))
    low, high = 1 - asked.clip_low, 1 + asked.clip_high
    if asked.surrogate == "weight":
        return np.clip(ratio, low, high)
    if asked.surrogate == "sigmoid":
        tau = np.where(advantage > 0, asked.soft_above, asked.soft_below)[step.row]
        gate = 1 / (1 + np.exp(-tau * (ratio - 1)))
        return 4 * gate * (1 - gate) * ratio
    if asked.surrogate == "gamma":
        return gamma_weights(step, asked, advantage, trained)
    if asked.surrogate == "mask":
        return np.where((ratio < low) | (ratio > high), 0.0, ratio)
    if asked.trusts:
        return np.where(beyond_trust(step, asked, advantage), 0.0, np.minimum(ratio, asked.dual_clip))
    held = np.where(advantage[step.row] >= 0, ratio > high, (ratio < low) | (ratio > asked.dual_clip))
    return np.where(held, 0.0, ratio)


def beyond_trust(step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray) -> np.ndarray:
    """Tokens outside the trust region that is asked for, shape (T,), bool."""
    change, _ = trust_change(step, asked)
    moved, up = np.exp(step.logp) - np.exp(step.old), advantage[step.row] > 0
    if asked.surrogate == "band":
        return (change > asked.clip_high) | (change < -asked.clip_low)
    if asked.surrogate == "tv":
        return np.where(up, change > asked.clip_high, change < -asked.clip_low)
    return np.where(up, (moved > 0) & (change > asked.clip_high), (moved < 0) & (change > asked.clip_low))


def trust_change(step: PolicyStep, asked: PolicyObjective) -> tuple[np.ndarray, np.ndarray]:
    """What a trust region bounds: pi - pi_old, or the KL of "this token or another"; and its derivative by log pi."""
    now, old = np.exp(step.logp), np.exp(step.old)
    if asked.surrogate != "binary-kl":
        return now - old, now
    missed, missed_old = (np.maximum(-np.expm1(logp), np.finfo(float).tiny) for logp in (step.logp, step.old))
    return old * (step.old - step.logp) + missed_old * np.log(missed_old / missed), missed_old * now / missed - old


def gamma_weights(step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """phi(w) of VESPO, one number a response, shape (T,)."""
    log_w, k, decay = _gamma(step, asked, advantage, trained)
    return np.exp(decay + k * log_w - decay * np.exp(log_w))[step.row]


def sensitivity(step: PolicyStep, asked: PolicyObjective) -> float:
    """How many times more than log-probabilities the weights may be off by rounding, 1 to ``MOST_SENSITIVE``.

    A weight phi(w) of VESPO changes by k - l w times what log w does; rows count by the size of their weights.
    """
    if asked.surrogate != "gamma":
        return 1.0
    log_w, k, decay = _gamma(step, asked, row_advantages(step, asked), trained_tokens(step, asked))
    weights = token_weights(step, asked)
    size = float(np.sqrt((weights**2).sum()))
    moved = float(np.sqrt(((weights * (k - decay * np.exp(log_w))[step.row]) ** 2).sum()))
    return min(max(1.0, moved / size if size else 1.0), MOST_SENSITIVE)


def _gamma(
    step: PolicyStep, asked: PolicyObjective, advantage: np.ndarray, trained: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log of w, k and l of VESPO's gamma function, shape (S,) each."""
    log_ratio = np.where(trained, step.logp - step.old, 0.0)
    if asked.correction != "none":
        log_ratio = log_ratio + np.where(
            trained, np.log(np.maximum(correction(step, asked, trained), GAMMA_LEAST)), 0.0
        )
    log_w = np.clip(step.sums(log_ratio), np.log(GAMMA_LEAST), GAMMA_MOST)
    k, decay = np.where((advantage >= 0)[:, None], asked.gamma_above, asked.gamma_below).T
    return log_w, k, decay


def correction_ratios(step: PolicyStep, asked: PolicyObjective, trained: np.ndarray) -> np.ndarray:
    """Ratio of the trainer's old probability to the sampling engine's, before any bound, shape (T,)."""
    log_ratio = np.where(trained & ~step.replayed(), step.old - step.sampler, 0.0)
    if asked.correction_level == "sequence":
        log_ratio = step.sums(log_ratio)[step.row]
    return np.exp(np.clip(log_ratio, -LIMIT, LIMIT))


def correction(step: PolicyStep, asked: PolicyObjective, trained: np.ndarray) -> np.ndarray:
    """Factor for the difference between trainer and sampling engine, shape (T,)."""
    if asked.correction == "none":
        return np.ones(len(step.row))
    ratio = correction_ratios(step, asked, trained)
    if asked.correction == "truncate":
        return np.clip(ratio, asked.correction_floor, asked.correction_cap)
    return np.where((ratio > asked.correction_cap) | (ratio < asked.correction_floor), 0.0, ratio)


def edges(step: PolicyStep, asked: PolicyObjective, width: float, other: Overrides | None = None) -> np.ndarray:
    """Tokens whose ratio lies so near a bound, on a log scale, that rounding decides whether they act, shape (T,)."""
    trained = trained_tokens(step, asked) if other is None or other.trained is None else other.trained
    near = np.zeros(len(step.row), bool)
    if asked.ratio != "none" and asked.surrogate in ("clip", "mask"):
        log_ratio = log_ratios(step, asked, trained)
        for bound in (1 - asked.clip_low, 1 + asked.clip_high, asked.dual_clip):
            if 0 < bound < np.inf:
                near |= np.abs(log_ratio - np.log(bound)) < width
    if asked.trusts:
        change, slope = trust_change(step, asked)
        for bound in (-asked.clip_low, asked.clip_high, *((asked.clip_low,) if asked.surrogate == "binary-kl" else ())):
            near |= np.abs(change - bound) < width * np.abs(slope)
    if asked.correction == "mask":
        log_ratio = np.log(correction_ratios(step, asked, trained))
        for bound in (asked.correction_floor, asked.correction_cap):
            if 0 < bound < np.inf:
                near |= np.abs(log_ratio - np.log(bound)) < width
    if asked.by_response:
        near = (step.sums((near & trained).astype(float)) > 0)[step.row]
    if asked.prefix == "kept":
        near |= near_kept(step, asked, width)
    return near & trained


def kl_value(difference: np.ndarray, estimator: str) -> np.ndarray:
    """An estimator of the KL from d = log pi - log pi_ref, shape (T,)."""
    if estimator == "k1":
        return difference
    held = np.clip(difference, -LIMIT, LIMIT)
    return held**2 / 2 if estimator == "k2" else np.exp(-held) - 1 + held


def kl_slope(difference: np.ndarray, estimator: str) -> np.ndarray:
    """Its derivative by log pi, shape (T,)."""
    if estimator == "k1":
        return np.ones_like(difference)
    held = np.clip(difference, -LIMIT, LIMIT)
    return held if estimator == "k2" else 1 - np.exp(-held)
