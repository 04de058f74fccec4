"""Supervised fine-tuning: maximum likelihood of demonstrations, one mean over all response tokens of the step.

    L = - (1 / N) sum_i sum_t log pi(y_it | x_i, y_i<t),   N = response tokens of the whole step

N is counted over all micro-batches and ranks (arXiv 2604.23747, Algorithm 2). With ``aggregation = "sequence-mean"``
every response counts the same: weight 1 / T_i, divided by the number of responses. That is also what
a trainer computes that averages micro-batch means and whose micro-batches hold one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from thence.data.trajectory import Trajectory
from thence.methods.base import Method, Options, TokenFacts, Weights
from thence.objective import Logp, Normaliser, Term


class SftOptions(Options):
    """Settings of SFT."""

    aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """token-mean: over all response tokens of the step. sequence-mean: over each response, then over responses."""


class SftMethod(Method):
    """Maximum likelihood of demonstrations."""

    name = "sft"
    stage = "sft"
    formula = "-(1/N) sum log pi(y_t), N = response tokens of the step"
    source = "arXiv 2604.23747, Algorithm 2"
    exactness = "exact"
    Options = SftOptions

    @property
    def terms(self) -> tuple[Term, ...]:
        by_token = self.options.aggregation == "token-mean"
        return (Term("sft", Logp(), Normaliser("tokens" if by_token else "sequences")),)

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        return [{"sft": weight} for weight in per_token(trajectories, self.options.aggregation)]


def per_token(trajectories: Sequence[Trajectory], aggregation: str) -> list[float]:
    """The weight of each token of a trajectory, whose sum is divided by the response tokens or the responses."""
    lengths = [len(trajectory.response_ids) for trajectory in trajectories]
    return [1.0 if aggregation == "token-mean" else 1 / max(n, 1) for n in lengths]
