"""Divergences of next-token distributions from a teacher's: values and logit gradients, one chunk of tokens at a time.

The parts of :class:`~thence.objective.surrogates.Divergence`. Tensors of shape (C, V) are those of one chunk; nobody
keeps them for longer. Formulas as ``compute_divergence`` and ``compute_topk_self_distillation_loss`` of TRL 1.16 have
them. The likeliest words are chosen by the policy; which they are is a constant to the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thence.objective.surrogates import Divergence


def diverging(surrogate: Divergence, p_CV: Tensor, log_p_CV: Tensor, log_t_CV: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence at every token of a chunk, shape (C,), and its gradient with respect to the logits, (C, V).

    Args:
        p_CV, log_p_CV: probabilities of the policy, and their logs.
        log_t_CV: log-probabilities of the teacher.
    """
    if 0 < surrogate.top_k < log_p_CV.shape[1]:
        return _of_the_likeliest(surrogate, log_p_CV, log_t_CV)
    return _between(surrogate, p_CV, log_p_CV, log_t_CV)


def _between(surrogate: Divergence, p: Tensor, log_p: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of whole distributions over words, shape (C,), and its gradient by the logits of p, (C, words)."""
    if surrogate.of == "forward":
        t = log_t.exp()
        value_C = sum_of_products(t, log_t - log_p)
        return value_C, t.neg_().add_(p)
    if surrogate.of == "reverse":
        gap = log_p - log_t
        value_C = sum_of_products(p, gap)
        return value_C, gap.sub_(value_C[:, None]).mul_(p)
    alpha = surrogate.alpha
    log_m, share = log_p + math.log1p(-alpha), log_t + math.log(alpha)
    torch.logaddexp(log_m, share, out=log_m)
    of_teacher_C = sum_of_products(torch.exp(log_t, out=share), log_t - log_m)
    del share
    gap = log_m.neg_().add_(log_p)
    of_policy_C = sum_of_products(p, gap)
    grad = gap.sub_(of_policy_C[:, None]).mul_(p).mul_(1 - alpha)
    return (1 - alpha) * of_policy_C + alpha * of_teacher_C, grad


def _of_the_likeliest(surrogate: Divergence, log_p_CV: Tensor, log_t_CV: Tensor) -> tuple[Tensor, Tensor]:
    words_CK = log_p_CV.topk(surrogate.top_k, 1).indices
    log_p_CK, log_t_CK = log_p_CV.gather(1, words_CK), log_t_CV.gather(1, words_CK)
    if not surrogate.tail:
        log_p_CK, log_t_CK = log_p_CK.log_softmax(1), log_t_CK.log_softmax(1)
        value_C, grad_CK = _between(surrogate, log_p_CK.exp(), log_p_CK, log_t_CK)
        return value_C, torch.zeros_like(log_p_CV).scatter_(1, words_CK, grad_CK)
    tail_t_C1 = log_t_CV.scatter(1, words_CK, -math.inf).logsumexp(1, keepdim=True)
    others_CV = log_p_CV.scatter(1, words_CK, -math.inf)
    tail_p_C1 = others_CV.logsumexp(1, keepdim=True)
    # one word more: the tail, whose logit is the log-sum of its words'
    log_p_CJ, log_t_CJ = torch.cat([log_p_CK, tail_p_C1], 1), torch.cat([log_t_CK, tail_t_C1], 1)
    value_C, grad_CJ = _between(surrogate, log_p_CJ.exp(), log_p_CJ, log_t_CJ)
    grad_CV = others_CV.sub_(tail_p_C1).exp_().mul_(grad_CJ[:, -1:])
    return value_C, grad_CV.scatter_(1, words_CK, grad_CJ[:, :-1])


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """The sum over words of products, shape (C,), without a tensor of the products."""
    return torch.einsum("cv,cv->c", left, right)
