"""Per-token estimators of the KL divergence from a reference policy, from samples of the current one.

With ``d = logp - reference``: k1 = d, k2 = d^2 / 2, k3 = exp(-d) + d - 1 (J. Schulman, "Approximating KL
divergence"; k3 is the term of GRPO, arXiv 2402.03300 eq. 4).
"""

from __future__ import annotations

from torch import Tensor


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
        return (-difference_T).exp() + difference_T - 1
    raise ValueError(f"unknown KL estimator {estimator!r}: use k1, k2 or k3")
