"""Mixed policy without shaping (arXiv 2504.14945, ablation of LUFFY): expert tokens act through their probability.

    L = - (1 / Z) [ sum over own tokens  r A_i  +  sum over expert tokens  pi A_i ] - eta * entropy

Everything else is LUFFY's. Its gradient on an expert token is pi * A, which vanishes where the policy finds the token
unlikely: what the shaping was made for. The row "mixed policy" of the paper's component table still had the clip on
own tokens: ``clip = true``.
"""

from __future__ import annotations

from typing import Literal

from thence.methods.luffy import Luffy, LuffyOptions


class MixedPolicyOptions(LuffyOptions):
    """LUFFY's, without shaping."""

    shaping: Literal["shape", "probability", "logp"] = "probability"
    """Surrogate of expert tokens. shape: pi / (pi + gamma). probability: pi. logp: log pi."""


class MixedPolicy(Luffy):
    """LUFFY with plain probabilities."""

    name = "mixed_policy"
    formula = "-(1/Z) [sum_own r A + sum_expert pi A], A = R - mean of the group with its demonstration"
    source = "arXiv 2504.14945, the component table's mixed policy"
    exactness = "exact"
    Options = MixedPolicyOptions
