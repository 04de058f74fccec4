"""A method of your own: policy gradient with one importance ratio a response, clipped as a whole.

    L = - (1 / B) sum_i min(s_i A_i, clip(s_i, 1 - band, 1 + band) A_i),   A_i = R_i - mean of the group
    s_i = exp( mean over tokens of [ log pi - log pi_old ] )

This text is what `thence methods sequence_ratio` prints. The method is GSPO (arXiv 2507.18071) without the standard
deviation and with one bound for both sides; thence ships GSPO itself as `gspo`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Options, TokenFacts, Weights, reward_of
from thence.objective import Logp, Normaliser, Term
from thence.settings.limits import Coefficient


class SequenceRatioOptions(Options):
    """Settings; each is checked, and has a line in `thence methods sequence_ratio`."""

    band: Coefficient = 4e-4
    """How far a response's ratio may be from one before it is held back."""


class SequenceRatio(Method):
    """Policy gradient with a clipped ratio of whole responses."""

    name = "sequence_ratio"
    stage = "rl"
    formula = "-(1/B) sum_i min(s A, clip(s) A), s = exp(mean over tokens of log pi - log pi_old)"
    source = "arXiv 2507.18071, simplified"
    exactness = "reconstruction"  # "exact" only if formula and mechanics are all public, and followed
    uses_old = True  # weigh() gets facts with the log-probabilities of the policy that sampled the batch
    Options = SequenceRatioOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        """A weighted sum of log-probabilities, divided by the number of responses of the whole optimizer step."""
        return (Term("policy", Logp(), Normaliser("sequences")),)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        """The gradient of s A is A s times the mean of the tokens' gradients; nothing where the clip acts."""
        groups = defaultdict(list)
        for trajectory in trajectories:
            groups[trajectory.prompt.group_key].append(reward_of(trajectory))
        weights: list[Weights] = []
        for trajectory, fact in zip(trajectories, facts, strict=True):
            group = groups[trajectory.prompt.group_key]
            advantage = reward_of(trajectory) - sum(group) / len(group)
            tokens = max(len(trajectory.response_ids), 1)
            ratio = (fact.log_ratio.double().sum() / tokens).exp().item()
            band = self.options.band
            held_back = ratio > 1 + band if advantage > 0 else ratio < 1 - band
            weights.append({"policy": 0.0 if held_back else advantage * ratio / tokens})
        return weights
