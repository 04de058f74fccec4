"""DFT (arXiv 2508.05629): maximum likelihood of demonstrations, every token weighed by its own probability.

    L = - (1 / N) sum_i sum_t sg(p_it) log p_it,   p_it = pi(y_it | x_i, y_i<t),   N = response tokens of the whole step

sg: without gradient. The gradient with respect to the logits is p (p - onehot): a token that the policy finds unlikely
hardly pulls, so little is learned from what is new. The authors report gains on mathematics and code, and failures
elsewhere. Published settings: lr 5e-5, batch 256, 1 epoch.

The released code has the same weight. It and TRL's ``loss_type = "dft"`` and LLaMA-Factory's ``use_dft_loss`` divide by
the tokens of what the trainer at hand divides by; here N is that of the whole step, over all micro-batches and ranks.
The logged ``loss`` falls where tokens become certain and where they become hopeless: it has its largest value at
p = 1/e. The plain cross-entropy of the same tokens is logged beside it (``nll``); the held-out loss is that too.
"""

from __future__ import annotations

from collections.abc import Sequence

from thence.data.trajectory import Trajectory
from thence.methods.base import TokenFacts, Weights
from thence.methods.sft import SftMethod, SftOptions, per_token
from thence.objective import Normaliser, ProbLogp, Term


class Dft(SftMethod):
    """Likelihood of demonstrations, weighed by the policy's own probability."""

    name = "dft"
    formula = "-(1/N) sum sg(p) log p, p = pi(y_t), N = response tokens of the step"
    source = "arXiv 2508.05629"
    exactness = "exact"
    Options = SftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        return (Term("dft", ProbLogp(), self.normaliser),)

    @property
    def normaliser(self) -> Normaliser:
        """Z of every term."""
        return Normaliser("tokens" if self.options.aggregation == "token-mean" else "sequences")

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        return [{"dft": weight} for weight in per_token(trajectories, self.options.aggregation)]
