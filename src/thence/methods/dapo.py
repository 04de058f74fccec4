"""DAPO (arXiv 2503.14476): clip-higher, token mean, dynamic sampling, soft penalty for overlong responses.

    L = - (1 / N) sum_i sum_t min(r A_i, clip(r, 0.8, 1.28) A_i), dual clip 3,   A_i = (R_i - mean) / (std + 1e-6)

Groups whose answers are all right or all wrong are dropped and others sampled in their place, at most
``max_generations`` times, over all ranks together: the first groups of the data's order that teach something are kept.
The penalty ``min(-(T - (L - b)) / b * factor, 0)`` is added to the reward; whether a group is dropped is decided on the
answers alone.

Two options, both off as published, spend sampling otherwise:

* ``over_sampling``: a round samples so many times the batch's prompts at once, so that fewer rounds follow one another.
  Groups beyond the batch are not trained.
* ``first_rollouts = k``: a group whose first k answers score the same is given up without its other n - k. That saves
  tokens and changes the gradient: a group with rare right answers is trained only where one is among the first k, so
  rare successes are learned from less often than with whole groups, and so are rare failures.

Tokens of responses that were sampled and are in no trained group stand in the metrics as ``unused_tokens``.

L and b follow the stage: L = ``max_tokens`` and b = L / 5, the ratio of the paper (20480 and 4096).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from pydantic import model_validator

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Trajectory
from thence.errors import RecipeError
from thence.methods.base import Sampler
from thence.methods.groups import sampled_groups
from thence.methods.grpo import Grpo, GrpoOptions
from thence.methods.unknown import scores_of
from thence.settings.limits import Ceiling, Coefficient, Count, Natural, Surplus, Tokens

log = logging.getLogger(__name__)


class DapoOptions(GrpoOptions):
    """GRPO's, with DAPO's values and its own."""

    dual_clip: Ceiling = 3.0
    """Dual clip: largest ratio of a negative advantage. inf: off."""
    std: bool = True
    """Divide advantages by the group's standard deviation."""
    dynamic_sampling: bool = True
    """Drop groups without a learning signal and sample others."""
    max_generations: Count = 10
    """Most generation rounds for one batch. After them, the groups found so far are trained."""
    over_sampling: Surplus = 1.0
    """Prompts of a generation round, as a multiple of the batch's. 1: as published."""
    first_rollouts: Natural = 0
    """Rollouts of a group that are sampled first; where they score the same, the others are not sampled. 0: off."""
    overlong_tokens: Tokens | None = None
    """Longest response, L of the penalty. none: the stage's max_tokens."""
    overlong_buffer: Natural | None = None
    """Length b over which the penalty grows. none: a fifth of L, as published. 0: no penalty."""
    overlong_factor: Coefficient = 1.0
    """Penalty at the longest response."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> DapoOptions:
        if (self.overlong_buffer or 0) > (self.overlong_tokens or math.inf):
            raise ValueError("overlong_buffer is longer than overlong_tokens")
        if not self.dynamic_sampling and (self.over_sampling > 1 or self.first_rollouts):
            raise ValueError("over_sampling and first_rollouts are parts of dynamic_sampling, which is off")
        if self.first_rollouts == 1:
            raise ValueError("first_rollouts = 1 gives every group up: a single answer cannot differ from others")
        return self


class Dapo(Grpo):
    """GRPO with DAPO's four changes."""

    name = "dapo"
    formula = "-(1/N) sum min(r A, clip(r, 0.8, 1.28) A) dual clip 3, A = (R - mean)/std, uninformative groups refilled"
    source = "arXiv 2503.14476"
    exactness = "exact"
    not_ahead = ""
    Options = DapoOptions
    longest = 20480
    """The stage's max_tokens; the paper's where there is no stage."""

    @property
    def least_rollouts(self) -> int:
        """Dynamic sampling keeps groups with different rewards only."""
        return 2 if self.options.dynamic_sampling else super().least_rollouts

    @property
    def overlong(self) -> tuple[int, int]:
        """L and b of the penalty."""
        o = self.options
        longest = self.longest if o.overlong_tokens is None else o.overlong_tokens
        return longest, longest // 5 if o.overlong_buffer is None else o.overlong_buffer

    def prepare(self, rollouts: int, max_tokens: int) -> None:
        super().prepare(rollouts, max_tokens)
        if self.options.first_rollouts >= rollouts:
            raise RecipeError(
                f"first_rollouts {self.options.first_rollouts} leaves nothing of a group of {rollouts} for later",
                remedy=f"set it below {rollouts}, or 0: off",
                field="options.first_rollouts",
            )
        self.longest = max_tokens
        longest, buffer = self.overlong
        if buffer > longest:
            raise RecipeError(
                f"overlong_buffer {buffer} is longer than max_tokens {max_tokens}",
                remedy="leave overlong_buffer out: it is then a fifth of max_tokens; 0: no penalty",
                field="options.overlong_buffer",
            )
        if buffer and self.options.overlong_factor and longest - buffer >= max_tokens:
            raise RecipeError(
                f"the overlong penalty begins above {longest - buffer} tokens, and max_tokens is {max_tokens}: "
                "it can never act",
                remedy="leave overlong_tokens and overlong_buffer out: they follow max_tokens; "
                "or set overlong_buffer = 0: no penalty",
                field="options.overlong_tokens",
            )

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        if not self.options.dynamic_sampling:
            return [self._penalised(t) for t in super().compose(sampler, prompts, n)]
        kept: list[list[Trajectory]] = []
        places: list[tuple[int, int, int]] = []  # of the groups of all ranks: draw, rank, place among the rank's own
        for _ in range(self.options.max_generations):
            found = [group for group in self._round(sampler, prompts, n) if is_informative(group)]
            mine = [(g[0].prompt.draw, sampler.rank, len(kept) + i) for i, g in enumerate(found)]
            places += [place for part in sampler.gather(mine) for place in part]
            kept += found
            if len(places) >= prompts:
                break
        else:
            log.warning(
                "only %d of %d groups had both right and wrong answers after %d rounds",
                len(places),
                prompts,
                self.options.max_generations,
            )
        chosen = [kept[i] for _, rank, i in sorted(places)[:prompts] if rank == sampler.rank]
        return [self._penalised(trajectory) for group in chosen for trajectory in group]

    def _round(self, sampler: Sampler, prompts: int, n: int) -> list[list[Trajectory]]:
        """This rank's groups of one generation round, whole ones: those that were given up are not among them."""
        first, count = self.options.first_rollouts, self._asked(prompts)
        if not first:
            return sampled_groups(sampler, count, n)
        begun = sampled_groups(sampler, count, first)
        begun = [group for group in begun if not is_decided(group)]
        others = sampler.rollouts([group[0].prompt for group in begun], n - first, first=first)
        size = n - first
        return [[*group, *others[i * size : i * size + size]] for i, group in enumerate(begun)]

    def _asked(self, prompts: int) -> int:
        """Prompts of a generation round of all ranks."""
        return math.ceil(prompts * self.options.over_sampling)

    def work(self, prompts: int, n: int) -> Work:
        options = self.options
        if not options.dynamic_sampling:
            return Work.just(Outcome(prompts * n, prompts * n))
        asked, begun = self._asked(prompts), options.first_rollouts or n
        # at best the first round has a whole batch; a group that is not trained costs its first rollouts at least
        whole = prompts * n + (asked - prompts) * begun
        # where every group is decided, each round costs its first rollouts, and nothing is trained
        least = Outcome(min(whole, options.max_generations * asked * begun), prompts * n)
        most = Outcome(options.max_generations * asked * n, prompts * n)
        return Work(least, most, "how many groups are all right or all wrong, and are sampled anew", asked)

    def _penalised(self, trajectory: Trajectory) -> Trajectory:
        if trajectory.score is None:
            return trajectory
        penalty = overlong_penalty(len(trajectory.response_ids), *self.overlong, self.options.overlong_factor)
        return trajectory.scored(trajectory.score + penalty)


def overlong_penalty(tokens: int, longest: int, buffer: int, factor: float = 1.0) -> float:
    """What is added to the reward of a response of so many tokens (arXiv 2503.14476 eq. 13): 0 down to ``-factor``."""
    if buffer == 0:
        return 0.0
    return min(-(tokens - (longest - buffer)) / buffer * factor, 0.0)


def is_decided(begun: Sequence[Trajectory]) -> bool:
    """Whether a group is given up after its first answers: all are known, and score the same."""
    return len(scores_of(begun)) == len(begun) and not is_informative(begun)


def is_informative(group: Sequence[Trajectory]) -> bool:
    """Whether the group's known scores differ: otherwise every advantage is zero."""
    scores = scores_of(group)
    return bool(scores) and not math.isclose(min(scores), max(scores))
