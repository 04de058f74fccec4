"""Pure functions on tensors: surrogates, advantages, normalisers and the one loss. No I/O, no torch.distributed."""

from thence.objective.advantages import group_advantages
from thence.objective.fused import Head, TokenInputs, TokenStats, logits_of, objective, token_statistics
from thence.objective.kl import kl_estimate
from thence.objective.sampled import Generation, Sampled
from thence.objective.surrogates import (
    Clip,
    Context,
    Entropy,
    Logp,
    NegativeKl,
    Prob,
    Ratio,
    Shape,
    ShapeRatio,
    Surrogate,
)
from thence.objective.terms import BareRow, Batch, Normaliser, Row, Term, divisors, local_counts, trained_tokens

__all__ = [
    "BareRow",
    "Batch",
    "Clip",
    "Context",
    "Entropy",
    "Generation",
    "Head",
    "Logp",
    "NegativeKl",
    "Normaliser",
    "Prob",
    "Ratio",
    "Row",
    "Sampled",
    "Shape",
    "ShapeRatio",
    "Surrogate",
    "Term",
    "TokenInputs",
    "TokenStats",
    "divisors",
    "group_advantages",
    "kl_estimate",
    "local_counts",
    "logits_of",
    "objective",
    "token_statistics",
    "trained_tokens",
]
