"""GIFT (arXiv 2601.09233): the target is the starting model's own distribution with the demonstrated token raised.

    L = - (1 / N) sum_i sum_t sum_v q(v) log p(v),   q = softmax(log p_ref + beta onehot(y_it))

p_ref is the model at the start of the stage. With a = 1 / (1 + p_ref(y) (e^beta - 1)) the same loss reads

    (1 - a) (- log p(y))  +  a CE(p_ref, p)

which is how it is computed: two terms with weights that follow from the reference model's probability of the token. It
reads every row twice: for a, and beside the policy for the cross-entropy of whole distributions.

beta = 20 (published) is plain SFT but for tokens that the starting model finds almost impossible: a is 2e-9 at
p_ref(y) = 1, 2e-3 at 1e-6, 0.67 at 1e-9. The log has the mean of a (``blend/mean``) and the share of tokens above some
bounds (``blend/above 0.01``, ...): look there before a difference from SFT is believed.

* ``smoothing``, ``floor``: the released code takes (1 - smoothing) p_ref + smoothing / V as p_ref, and adds 1e-10 to
  every probability. Its script sets smoothing 0; the floor is fixed, set ``floor = 1e-10`` for it. A token that
  the starting model excludes then has a = 0.95 at most.
* The code adds the means of micro-batches of 2 rows without dividing by their number. Its gradient is that many times
  as large, before clipping, and rows with few tokens count more. Here the sum is divided by the N of the step.
* Published settings: lr 1e-5, batch 128, 10 epochs, the best checkpoint by held-out loss (``keep_best``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights
from thence.methods.dft import Dft
from thence.methods.sft import SftOptions, per_token
from thence.objective import Logp, RefCE, Term, smoothed
from thence.settings.limits import Coefficient, Share

BOUNDS = (0.001, 0.01, 0.1, 0.5)
"""The log has the share of tokens whose a is above each."""


class GiftOptions(SftOptions):
    """Settings of GIFT."""

    beta: Coefficient = 20.0
    """How far the demonstrated token is raised, in nats. 0: the target is the starting model itself."""
    smoothing: Share = 0.0
    """Share of the uniform distribution in the starting model's. 0: the released script."""
    floor: Share = 0.0
    """Added to each of its probabilities, which are then made to sum to one again. 1e-10: the released code."""


class Gift(Dft):
    """Cross-entropy to the starting model's distribution with the demonstrated token raised."""

    name = "gift"
    formula = "-(1/N) sum_t sum_v q log p, q = softmax(log p_ref + beta onehot(y_t))"
    source = "arXiv 2601.09233 Algorithm 1, and its code (zzy1127/GIFT @ba91084)"
    exactness = "exact"
    uses_reference = True
    Options = GiftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        return (
            Term("likelihood", Logp(), self.normaliser),
            Term("reference", RefCE("cross-entropy", o.smoothing, o.floor), self.normaliser),
        )

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        weights = per_token(trajectories, self.options.aggregation)
        blends = [self._blend(fact) for fact in facts]
        return [
            {"likelihood": w * (1 - blend_n), "reference": w * blend_n}
            for w, blend_n in zip(weights, blends, strict=True)
        ]

    def figures(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> dict[str, float]:
        blend_n = torch.cat([torch.zeros(0, dtype=torch.float64), *(self._blend(fact) for fact in facts)])
        above = {f"blend/above {bound}": float((blend_n > bound).sum()) for bound in BOUNDS}
        return {"blend/mean": float(blend_n.sum()), **above}

    def _blend(self, fact: TokenFacts) -> Tensor:
        """a at every response token, shape (n,), float64.

        Raises:
            UserError: the facts lack the reference model.
        """
        o = self.options
        log_ref_n = smoothed(fact.of_reference.double(), fact.vocabulary, o.smoothing, o.floor)
        return blend(log_ref_n, o.beta)


def blend(log_ref_n: Tensor, beta: float) -> Tensor:
    """a = 1 / (1 + p_ref (e^beta - 1)) from log p_ref, finite for any beta of 0 or more. Shape (n,)."""
    if not beta:
        return torch.ones_like(log_ref_n)
    return torch.sigmoid(-(log_ref_n + beta + math.log(-math.expm1(-beta))))
