"""Per-token estimators of the KL divergence from a reference policy, from samples of the current one.

With ``d = logp - reference``: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (J. Schulman, "Approximating KL
divergence"; k3 is the term of GRPO, arXiv 2402.03300 eq. 4).

The exponential of k3 is bounded: above an exponent of 20 it follows its tangent, ``exp(20) (1 - d - 20)``. Value
and slope are then finite and continuous, and the slope keeps its sign: a policy that has lost a token is still pulled
back to it. TRL has no bound, so a difference of 100 is infinite in float32. verl bounds the exponent to +-20 and then
k3 to 10, OpenRLHF k3 to 10: a token past that has no gradient there, and the penalty lets go of it.
"""

from __future__ import annotations

from torch import Tensor

EXPONENT_LIMIT = 20.0  # exp(20) is finite in float32, and in sums over many tokens


def bounded_exp(x_T: Tensor) -> Tensor:
    """exp(x), and above x = 20 its tangent there. Shape (T,)."""
    return x_T.clamp(max=EXPONENT_LIMIT).exp() * (1 + (x_T - EXPONENT_LIMIT).clamp(min=0))


def kl_estimate(logp_T: Tensor, reference_T: Tensor, estimator: str = "k3") -> Tensor:
    """The estimate at every token, in nats; k3 is never negative. Shape (T,).

    Raises:
        ValueError: an estimator other than k1, k2, k3.
    """
    difference_T = logp_T - reference_T
    if estimator == "k1":
        return difference_T
    if estimator == "k2":
        return difference_T.square() / 2
    if estimator == "k3":
        return bounded_exp(-difference_T) + difference_T - 1
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2 or k3")
