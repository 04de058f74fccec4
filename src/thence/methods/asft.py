"""ASFT (arXiv 2509.23753): DFT, held by a KL to the model that the stage began with.

    L = - (1 / N) sum_i sum_t [ sg(p_it) log p_it  -  lambda KL(p_ref || p) at (i, t) ]

p_ref is the model at the start of the stage, and the KL is that of whole next-token distributions, not an estimate from
the taken token: its gradient with respect to the logits is lambda (p - p_ref). The reference model reads every row
beside the policy; a chunk of its logits at a time is kept, never all.

* ``direction``: ``forward`` is KL(p_ref || p), as the released code and LLaMA-Factory's ``use_asft_loss`` compute it.
  ``reverse`` is KL(p || p_ref), as a reviewer reads the text; its gradient is lambda p (log(p / p_ref) - KL).
* ``kl``: lambda, 0.1 in the code, 0.05 in its README.
* Codes average every micro-batch by itself (LLaMA-Factory: both terms). Here both are divided by the N of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights, switched_on
from thence.methods.dft import Dft
from thence.methods.sft import SftOptions, per_token
from thence.objective import ProbLogp, RefCE, Term
from thence.settings.limits import Coefficient


class AsftOptions(SftOptions):
    """Settings of ASFT."""

    kl: Coefficient = 0.1
    """Lambda, the coefficient of the KL: 0.1 code, 0.05 its README. 0: DFT, and no reference model is kept."""
    direction: Literal["forward", "reverse"] = "forward"
    """forward: KL(p_ref || p), the code. reverse: KL(p || p_ref)."""


class Asft(Dft):
    """DFT with a KL of whole distributions to the model at the start of the stage."""

    name = "asft"
    formula = "-(1/N) sum (sg(p) log p - lambda KL(p_ref || p)), KL over the whole vocabulary"
    source = "arXiv 2509.23753 and its code"
    exactness = "exact"
    Options = AsftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        o = self.options
        held = (Term("kl", RefCE(o.direction), self.normaliser),) if o.kl else ()
        return (Term("dft", ProbLogp(), self.normaliser), *held)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        return [{"dft": w, **switched_on(kl=o.kl * w)} for w in per_token(trajectories, o.aggregation)]
