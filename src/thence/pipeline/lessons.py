"""What an RL step could learn from: groups without a lesson, the distance to the reference, and warnings about both."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from thence.data.trajectory import Trajectory
from thence.objective import NegativeKl, Row, Term, TokenStats, is_penalty
from thence.objective.kl import kl_estimate
from thence.train.parallel import Ranks
from thence.train.step import Observer

log = logging.getLogger(__name__)

DEAD_STEPS = 10  # consecutive steps without any lesson before the warning
CUT_SHARE, CUT_STEPS = 0.5, 3  # more of the responses than that, in so many consecutive steps
UNKNOWN_SHARE = 0.1  # of a step's responses
NOTHING = 1e-200  # a smaller weight only makes a token count in a normaliser


class Lessons:
    """Of one rollout batch: which groups moved the policy, and how far it stands from its reference.

    A group is the trajectories of one prompt. It is dead where none of its tokens has a weight in a term other than
    entropy bonus and KL: all its rewards are equal, or nobody can judge them.
    """

    def __init__(self, ranks: Ranks, terms: Sequence[Term]) -> None:
        self.ranks = ranks
        self.live: set[tuple[int, int]] = set()
        self.taught_J = [not is_penalty(term) for term in terms]
        self.kl_term = next((j for j, term in enumerate(terms) if isinstance(term.surrogate, NegativeKl)), None)
        surrogate = None if self.kl_term is None else terms[self.kl_term].surrogate
        self.estimator = surrogate.estimator if isinstance(surrogate, NegativeKl) else "k3"
        self.kl_sum = self.kl_tokens = 0.0

    def add(self, trajectories: Sequence[Trajectory], rows: Sequence[Row]) -> None:
        """Take in the rows of one optimizer step."""
        for trajectory, row in zip(trajectories, rows, strict=True):
            if (row.weights[self.taught_J].abs() > NOTHING).any():
                self.live.add(trajectory.prompt.group_key)

    def observers(self, rows: Sequence[Row]) -> list[Observer]:
        """For :meth:`Trainer.step` on these rows; none without a KL term."""
        j = self.kl_term
        if j is None:
            return []

        def observe(group: Sequence[int], stats: TokenStats) -> None:
            sizes = [rows[i].n_trained for i in group]
            for i, logp_n in zip(group, stats.logp_T.double().cpu().split(sizes), strict=True):
                reference = rows[i].reference
                assert reference is not None, "a KL term needs reference log-probabilities"
                penalised_n = rows[i].weights[j].cpu() != 0
                estimate_n = kl_estimate(logp_n, reference.double().cpu(), self.estimator)
                self.kl_sum += float(estimate_n[penalised_n].sum())
                self.kl_tokens += int(penalised_n.sum())

        return [observe]

    def line(self, composed: Sequence[Trajectory], sampled: int) -> dict[str, float]:
        """``dead_groups``: share of groups, over all ranks, that moved nothing; 1 where every group that was sampled
        was thrown away, absent where nothing was sampled. ``kl``: mean over the tokens under the KL term.

        Args:
            composed: what the method made of the batch, before responses that nobody can judge were left out.
            sampled: responses of this rank.
        """
        groups = {trajectory.prompt.group_key for trajectory in composed}
        counts = [float(x) for x in (len(groups), len(self.live), sampled, self.kl_sum, self.kl_tokens)]
        total, live, seen, kl, tokens = self.ranks.sum_floats(torch.tensor(counts, dtype=torch.float64)).tolist()
        line: dict[str, float] = {}
        if seen or total:
            line["dead_groups"] = 1 - live / total if total else 1.0
        if tokens:
            line["kl"] = kl / tokens
        return line


class Watch:
    """Warns of what a stage would otherwise do in silence: steps that teach nothing, responses that are cut short or
    that nobody judged. Each is said once a stage, with what helps."""

    def __init__(self, stage: str, unknown: str) -> None:
        self.stage, self.unknown = stage, unknown
        self.dead = self.cut = 0
        self.told: set[str] = set()

    def look(self, step: int, line: Mapping[str, Any]) -> None:
        """Look at a step's line of metrics."""
        if "dead_groups" in line:
            self.dead = self.dead + 1 if line["dead_groups"] >= 1 else 0
            if self.dead == DEAD_STEPS:
                self._say_dead(step, line)
        self.cut = self.cut + 1 if line.get("truncated", 0.0) > CUT_SHARE else 0
        if self.cut == CUT_STEPS:
            self._say(
                "cut",
                f"{line['truncated']:.0%} of the responses of step {step} were cut off at the limit, and most "
                f"of the {CUT_STEPS - 1} steps before. What is cut has no answer, so its reward says little. Raise "
                "max_tokens; or look whether the model ends its responses (`thence sample`)",
            )
        share = line.get("unknown_share", 0.0)
        if share >= UNKNOWN_SHARE:
            done = "left out" if self.unknown == "leave-out" else "trained as a reward of 0"
            self._say(
                "unknown",
                f"nobody could judge {line['unknown']} responses of step {step} ({share:.0%}); they are {done}. "
                "`thence sample RUN --verdict unknown` shows why",
            )

    def _say_dead(self, step: int, line: Mapping[str, Any]) -> None:
        if line.get("taught_share", 1.0) == 0:
            self._say(
                "dead",
                f"nothing was learned in the last {self.dead} steps: at step {step} no response had a teacher. Look at "
                "the samples (`thence sample`): a teacher reads a demonstration, or a right response of the same group "
                "(options.success); if none is right, train SFT first or take easier problems",
            )
            return
        said = f"nothing was learned from rewards in the last {self.dead} steps: the rewards of every group were equal"
        if line["reward"] == 0 and line.get("reward_std") == 0:
            self._say(
                "dead",
                f"{said}, and all of them 0 at step {step}. Look at the samples (`thence sample`): if answers are "
                "right, the reward does not find them (its name, the form of the answer, max_tokens); if none is "
                "right, train SFT first or take easier problems",
            )
            return
        self._say(
            "dead",
            f"{said} (reward {line['reward']:.3g} at step {step}). Look at the samples (`thence sample`), at reward, "
            "and at the data: too hard or too easy problems, or a grader that never says right",
        )

    def _say(self, what: str, text: str) -> None:
        if what not in self.told:
            self.told.add(what)
            log.warning("%s: %s; this is said once", self.stage, text)


def each_of(observers: Sequence[Observer]) -> Observer | None:
    """One observer that tells all of them; None where there is none."""
    if not observers:
        return None

    def observe(group: Sequence[int], stats: TokenStats) -> None:
        for observer in observers:
            observer(group, stats)

    return observe
