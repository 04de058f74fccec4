"""Pure functions on tensors: surrogates, advantages, normalisers and the one loss. No I/O, no torch.distributed."""

from thence.objective.advantages import group_advantages
from thence.objective.distributions import compares, smoothed
from thence.objective.fused import (
    Head,
    ReferenceStates,
    TokenInputs,
    TokenStats,
    logits_of,
    objective,
    token_statistics,
)
from thence.objective.kl import kl_estimate
from thence.objective.sampled import Generation, Sampled
from thence.objective.surrogates import (
    Clip,
    Context,
    Entropy,
    Logp,
    NegativeKl,
    Prob,
    ProbLogp,
    Ratio,
    RefCE,
    Shape,
    ShapeRatio,
    Surrogate,
    TrSft,
)
from thence.objective.terms import (
    BareRow,
    Batch,
    Normaliser,
    Row,
    Term,
    divisors,
    is_penalty,
    local_counts,
    trained_tokens,
)
from thence.objective.trust import CappedRatio, SquaredGap, TrustMask, binary_kl

__all__ = [
    "BareRow",
    "Batch",
    "CappedRatio",
    "Clip",
    "Context",
    "Entropy",
    "Generation",
    "Head",
    "Logp",
    "NegativeKl",
    "Normaliser",
    "Prob",
    "ProbLogp",
    "Ratio",
    "RefCE",
    "ReferenceStates",
    "Row",
    "Sampled",
    "Shape",
    "ShapeRatio",
    "SquaredGap",
    "Surrogate",
    "Term",
    "TokenInputs",
    "TokenStats",
    "TrSft",
    "TrustMask",
    "binary_kl",
    "compares",
    "divisors",
    "group_advantages",
    "is_penalty",
    "kl_estimate",
    "local_counts",
    "logits_of",
    "objective",
    "smoothed",
    "token_statistics",
    "trained_tokens",
]
