"""Correction for rollouts that another program than the trainer, or an earlier policy, has sampled.

Sampler and trainer compute the probabilities of one and the same policy in different ways, and they differ: by rounding
in float32, by more in bfloat16, by much where weights are stale. Then the tokens come from a policy pi_sampler, while
the objective takes them for draws from pi_trainer. Every token's term is weighted by the truncated importance ratio

    w_t = min( exp(log pi_trainer(a_t | s_t) - log pi_sampler(a_t | s_t)), C )

without a gradient through w_t. Truncated importance sampling: Ionides 2008; for this mismatch in language models: Yao
et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

pi_trainer is the policy before the first optimizer step on the rollout batch. So there are three policies where
responses are sampled ahead (``rl.ahead``), and the loss is that of decoupled PPO:

    L = - (1 / Z) sum_t  w_t min( u_t A, clip(u_t, 1 - low, 1 + high) A ),     u_t = pi_theta(a_t | s_t) / pi_trainer

pi_sampler, the behaviour policy, draws the tokens; pi_trainer, the proximal policy, is what the clip stays near to;
pi_theta is trained. A ratio to the sampler alone would begin outside of its clip: tokens would have no gradient for
what earlier batches did to them. Hilton et al. 2021 (arXiv 2110.00641) separate the two, and AReaL (arXiv 2505.24298)
trains language models so, with pi_trainer computed by a pass of the trainer as here. TRL's AsyncGRPOTrainer has one
ratio, to the sampler.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BOUND = 2.0


def truncated_importance(trainer_logp_T: Tensor, sampler_logp_T: Tensor, bound: float = BOUND) -> Tensor:
    """The weight of every sampled token.

    Args:
        trainer_logp_T: the trainer's log-probabilities of the sampled tokens before the first optimizer step on their
            rollout batch, at the sampling temperature, shape (T,) or any other. Not of the policy that is being
            updated: that ratio is the objective's own.
        sampler_logp_T: the sampler's log-probabilities of the same tokens, same shape.
        bound: C, the largest weight.

    Returns:
        Weights in (0, bound], same shape and dtype as the trainer's, detached.

    Raises:
        ValueError: the shapes differ, a log-probability is not finite, or the bound is not positive.
    """
    if trainer_logp_T.shape != sampler_logp_T.shape:
        raise ValueError(f"shapes {tuple(trainer_logp_T.shape)} and {tuple(sampler_logp_T.shape)} differ")
    if not bound > 0:
        raise ValueError(f"bound {bound} is not positive")
    trainer_T = trainer_logp_T.detach()
    difference_T = trainer_T - sampler_logp_T.detach().to(trainer_T)
    if not torch.isfinite(difference_T).all():
        raise ValueError("a log-probability is not finite")
    # Truncated before the exponential, which would overflow to infinity. At the bound a weight is the bound itself.
    most = math.log(bound)
    weights_T = difference_T.clamp(max=most).exp().clamp(max=bound)
    return torch.where(difference_T >= most, torch.full_like(weights_T, bound), weights_T)
