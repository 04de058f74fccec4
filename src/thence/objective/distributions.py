"""Next-token distributions held against those of another model, one chunk of tokens at a time.

The parts of :class:`~thence.objective.surrogates.RefCE`: its values, and the gradient with respect to the logits. Those
of :class:`~thence.objective.surrogates.Divergence` are in :mod:`.divergence`.
Tensors of shape (C, V) are those of one chunk; nobody keeps them for longer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thence.objective.divergence import diverging, sum_of_products
from thence.objective.surrogates import Divergence, RefCE
from thence.objective.terms import Term


def compares(terms: Sequence[Term]) -> bool:
    """Whether any term looks at the whole distribution of a reference model."""
    return any(isinstance(term.surrogate, RefCE) for term in terms)


def distils(terms: Sequence[Term]) -> bool:
    """Whether any term looks at the whole distribution of a teacher, who reads rows of its own."""
    return any(isinstance(term.surrogate, Divergence) for term in terms)


def smoothed(log_p: Tensor, vocabulary: int, smoothing: float = 0.0, floor: float = 0.0) -> Tensor:
    """Log-probabilities of ((1 - s) p + s / V + f) / (1 + V f), in nats. The shape is that of ``log_p``.

    Args:
        log_p: of any words of distributions over ``vocabulary`` words.
        smoothing: s, the share of the uniform distribution.
        floor: f, added to every probability.
    """
    if not smoothing and not floor:
        return log_p
    least = smoothing / vocabulary + floor
    return (log_p.exp() * (1 - smoothing)).add_(least).div_(1 + vocabulary * floor).log_()


def held_against(
    weighed: Sequence[tuple[RefCE | Divergence, Tensor]], p_CV: Tensor, log_p_CV: Tensor, log_ref_CV: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of S over a chunk, and the gradient of minus that sum with respect to the logits, (C, V).

    Args:
        weighed: the surrogates, one at least, each with its weights over the normaliser, shape (C,).
        p_CV, log_p_CV: probabilities of the policy, and their logs.
        log_ref_CV: log-probabilities of the reference model, or of the teacher.
    """
    total, grads = log_p_CV.new_zeros(()), []
    for surrogate, weight_C in weighed:
        if isinstance(surrogate, Divergence):
            value_C, grad_CV = diverging(surrogate, p_CV, log_p_CV, log_ref_CV)
            total = total - (weight_C * value_C).sum()
            grads.append(grad_CV.mul_(weight_C[:, None]))
            continue
        held_CV = smoothed(log_ref_CV, log_p_CV.shape[1], surrogate.smoothing, surrogate.floor)
        if surrogate.of == "reverse":
            grad_CV = log_p_CV - held_CV
            value_C = -sum_of_products(p_CV, grad_CV)
            grad_CV.add_(value_C[:, None]).mul_(p_CV)
        else:
            grad_CV = held_CV.exp()
            gap_CV = log_p_CV if surrogate.of == "cross-entropy" else log_p_CV - held_CV
            value_C = sum_of_products(grad_CV, gap_CV)
            grad_CV.neg_().add_(p_CV)
        total = total + (weight_C * value_C).sum()
        grads.append(grad_CV.mul_(weight_C[:, None]))
    return total, grads[0] if len(grads) == 1 else torch.stack(grads).sum(0)
