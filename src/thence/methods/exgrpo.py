"""ExGRPO: half of the prompts come from a pool of the policy's own past successes, and one of these joins the group.

    L = - (1 / Z) [ sum_fresh r A_i + sum_replay r_b / (r_b + 0.1) A_i ] - eta * entropy
    r_b = pi / pi_past from stored log-probabilities,   A_i = R_i - mean of the whole group; no clip

A prompt that k of the n members of its group got right is put into bucket k of the pool, 0 < k < n, with its right
responses; one that all got right is retired for good, and one that none got right stays as it was. As soon as a batch
was right more often than ``start``, a share ``replay`` of the next batches' prompts comes from the pool: a bucket is
drawn with probability ~ N(k; n/2, 1) (``buckets = "counts"``, the code) or N(k/n; 0.5, 1) (``"fractions"``, the paper),
then a prompt of it uniformly. It has n - 1 fresh rollouts and one replay, which counts as right in k.

One deviation. The replayed response should be the one with the lowest entropy under the policy as it is now; here
the entropy is estimated when a response is sampled, as the mean of -log pi of its tokens, and never again. So only the
best response of a prompt is held. Stored log-probabilities are those that the sampler reported. (The released code
averages entropies over padding too, an apparent bug that is not followed.)

All ranks hold the same pool, and each has its share of the batch. ``normaliser = "paper"`` is
``clean``; ``code`` divides by ranks x longest response. Published for 7B: 128 prompts, n = 8, lr 1e-6, 700 steps, and
the stage's skip_norm 500.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

from thence.accounting.work import Outcome, Work
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import UserError
from thence.methods.base import Method, Sampler, TokenFacts, Weights, switched_on
from thence.methods.mixed import MixedOptions, advantages, entropy_term, policy_normaliser
from thence.objective import Ratio, ShapeRatio, Term
from thence.settings.limits import Share, SomeCoefficient


class ExGrpoOptions(MixedOptions):
    """Settings of ExGRPO."""

    replay: Share = 0.5
    """Share of prompts from the pool, if it holds that many."""
    start: Share = 0.35
    """Replay starts after the first rollout batch with a higher share of right responses."""
    gamma: SomeCoefficient = 0.1
    """Gamma of the shaped ratio of replayed tokens."""
    buckets: Literal["counts", "fractions"] = "counts"
    """The variable of the normal distribution over buckets: successes, or successes over group size."""
    sigma: SomeCoefficient = 1.0
    """Standard deviation of the distribution over buckets."""


@dataclass(frozen=True)
class Experience:
    """A prompt of the pool.

    Args:
        successes: its bucket: how many members of its last group were right, if any were.
        entropy: of the trajectory when it was sampled, nats.
        trajectory: the right response to replay, with its log-probabilities.
    """

    successes: int
    entropy: float
    trajectory: Trajectory


@dataclass(frozen=True)
class Lesson:
    """What a prompt's group says of it: its members, how many are right, and the best that was sampled just now."""

    index: int
    members: int
    right: int
    best: Experience | None


class Fresh:
    """The new prompts of a batch: this rank's, their places among those of all ranks, and the indices of all."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.places: list[int] = []
        self.indices: set[int] = set()
        self.total = 0

    def add(self, sampler: Sampler, count: int) -> None:
        """Draw so many more over all ranks."""
        mine = sampler.next_prompts(count)
        self.prompts += mine
        self.places += [self.total + sampler.rank + i * sampler.world for i in range(len(mine))]
        self.indices.update(index for part in sampler.gather([p.index for p in mine]) for index in part)
        self.total += count


class ExGrpo(Method):
    """Policy gradient on fresh rollouts and replayed successes."""

    name = "exgrpo"
    stage = "rl"
    formula = "-(1/N) [sum_fresh r A + sum_replay r_b/(r_b + 0.1) A], A = R - mean of 7 fresh and 1 of the past"
    source = "ExGRPO's paper and released code"
    exactness = "reconstruction"
    not_ahead = "it replays responses from a pool of the batches before"
    single_turn = "it replays responses, and its pool keeps their own tokens without what an environment said between"
    Options = ExGrpoOptions

    def __init__(self, options: Mapping[str, Any] | None = None):
        super().__init__(options)
        self.pool: dict[int, Experience] = {}
        self.retired: set[int] = set()
        self.started = False

    @property
    def least_rollouts(self) -> int:
        """A prompt of the pool was right and wrong, and has a fresh rollout beside its replay."""
        return 2

    @property
    def terms(self) -> tuple[Term, ...]:
        o, normaliser = self.options, policy_normaliser(self.options)
        replay = Term("replay", ShapeRatio(o.gamma), normaliser)
        return (Term("policy", Ratio(), normaliser), replay, *entropy_term(o))

    def weigh(self, trajectories: Sequence[Trajectory], facts: Sequence[TokenFacts] = ()) -> list[Weights]:
        o = self.options
        weights = []
        for trajectory, advantage in zip(trajectories, advantages(trajectories, o.std).tolist(), strict=True):
            policy, replay = (0.0, advantage) if trajectory.origin == "replay" else (advantage, 0.0)
            weights.append({"policy": policy, "replay": replay, **switched_on(entropy=o.entropy)})
        return weights

    def compose(self, sampler: Sampler, prompts: int, n: int) -> list[Trajectory]:
        fresh, replayed = self.choose(sampler, prompts, n)
        order = alternate(fresh.total, len(replayed))
        mine = replayed[sampler.rank :: sampler.world]
        plain = iter(sampler.rollouts(fresh.prompts, n) if fresh.prompts else [])
        beside = iter(sampler.rollouts([e.trajectory.prompt for e in mine], n - 1) if mine and n > 1 else [])
        groups = [(order.index((0, i)), list(islice(plain, n))) for i in fresh.places]
        for i, experience in enumerate(mine):
            place = order.index((1, sampler.rank + i * sampler.world))
            groups.append((place, [*islice(beside, n - 1), experience.trajectory]))
        groups = [(place, drawn_at(group, place)) for place, group in sorted(groups, key=lambda entry: entry[0])]
        lessons = sampler.gather([(place, lesson(group)) for place, group in groups])
        for _, learned in sorted((entry for part in lessons for entry in part), key=lambda entry: entry[0]):
            self.learn(learned)
        found = [t for _, group in groups for t in group]
        sampled = [t for t in found if t.origin == "rollout" and t.score is not None]
        if any(t.verdict == "graded" for t in sampled):
            raise UserError(
                "exgrpo replays right responses, but the reward gives degrees and does not say what is right",
                remedy="state from which score a response is right: reward_right_from, or the function's attribute "
                "right_from",
                field="reward",
            )
        right, total = sampler.total(sum(t.verdict == "right" for t in sampled)), sampler.total(len(sampled))
        self.started = self.started or right > self.options.start * total
        return found

    def work(self, prompts: int, n: int) -> Work:
        own = prompts * n
        least = Outcome(own - int(self.options.replay * prompts), own)
        return Work(least, Outcome(own, own), "how many prompts are replayed")

    def choose(self, sampler: Sampler, prompts: int, n: int) -> tuple[Fresh, list[Experience]]:
        """The prompts of a batch: this rank's new ones, and those of all ranks with a replay; none is among both."""
        wanted = min(int(self.options.replay * prompts), len(self.pool)) if self.started else 0
        fresh = Fresh()
        if prompts > wanted:
            fresh.add(sampler, prompts - wanted)
        taken = set(fresh.indices)
        replayed: list[Experience] = []
        for draw in range(wanted):
            found = self.draw(sampler, draw, taken, n)
            if found is not None:
                replayed.append(found)
                taken.add(found.trajectory.prompt.index)
        while fresh.total + len(replayed) < prompts:
            fresh.add(sampler, prompts - fresh.total - len(replayed))
            replayed = [e for e in replayed if e.trajectory.prompt.index not in fresh.indices]
        return fresh, replayed

    def draw(self, sampler: Sampler, draw: int, taken: set[int], n: int) -> Experience | None:
        """One prompt of the pool that is not taken: a bucket by its weight, then a prompt uniformly."""
        buckets: dict[int, list[int]] = {}
        for index in sorted(self.pool.keys() - taken):
            buckets.setdefault(self.pool[index].successes, []).append(index)
        if not buckets:
            return None
        order = sorted(buckets)
        weights = [bucket_weight(k, n, self.options.sigma, self.options.buckets) for k in order]
        point = sampler.uniform("bucket", draw) * sum(weights)
        chosen = order[-1]
        for k, weight in zip(order, weights, strict=True):
            point -= weight
            if point < 0:
                chosen = k
                break
        members = buckets[chosen]
        return self.pool[members[int(sampler.uniform("prompt", draw) * len(members))]]

    def learn(self, learned: Lesson) -> None:
        """Put a prompt's group into the pool, or retire the prompt."""
        index = learned.index
        if learned.right == learned.members:
            self.retired.add(index)
            self.pool.pop(index, None)
        if not learned.right or index in self.retired:
            return
        known = self.pool.get(index)
        found = [Experience(learned.right, known.entropy, known.trajectory)] if known is not None else []
        found += [learned.best] if learned.best is not None else []
        if found:
            self.pool[index] = min(found, key=lambda e: e.entropy)

    def state(self) -> dict[str, Any]:
        return {
            "started": self.started,
            "retired": sorted(self.retired),
            "pool": [asdict(self.pool[index]) for index in sorted(self.pool)],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.started, self.retired = state["started"], set(state["retired"])
        self.pool = {}
        for entry in state["pool"]:
            plain = with_tuples(entry["trajectory"])
            trajectory = Trajectory(**{**plain, "prompt": Prompt(**with_tuples(plain["prompt"]))})
            self.pool[trajectory.prompt.index] = Experience(entry["successes"], entry["entropy"], trajectory)


def with_tuples(plain: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()}


def experience(trajectory: Trajectory, successes: int) -> Experience:
    """A right response as it is kept."""
    assert trajectory.sampler_logps is not None, "a rollout has the sampler's log-probabilities"
    logps = trajectory.sampler_logps
    kept = replace(
        trajectory,
        prompt=replace(trajectory.prompt, demonstration_ids=None, draw=0),  # never used, and long
        origin="replay",
        behaviour=logps,
        sampler_logps=None,
    )
    return Experience(successes, -sum(logps) / max(len(logps), 1), kept)


def bucket_weight(successes: int, n: int, sigma: float = 1.0, of: str = "counts") -> float:
    """Weight of a bucket when one is drawn, up to a constant."""
    distance = successes - n / 2 if of == "counts" else successes / n - 0.5
    return math.exp(-0.5 * (distance / sigma) ** 2)


def alternate(first: int, second: int) -> list[tuple[int, int]]:
    """So many of two kinds in turn, evenly, so that each optimizer step of a batch has its share of each.

    Returns:
        (kind, number among its kind) of each place.
    """
    found = [((i + 0.5) / first, 0, i) for i in range(first)] + [((i + 0.5) / second, 1, i) for i in range(second)]
    return [(kind, i) for _, kind, i in sorted(found)]


def drawn_at(group: Sequence[Trajectory], place: int) -> list[Trajectory]:
    """A prompt's group at another place in the batch."""
    return [replace(t, prompt=replace(t.prompt, draw=place)) for t in group]


def lesson(group: Sequence[Trajectory]) -> Lesson:
    """What a group says of its prompt."""
    right = [t for t in group if t.verdict == "right"]
    sampled = [experience(t, len(right)) for t in right if t.origin == "rollout"]
    return Lesson(group[0].prompt.index, len(group), len(right), min(sampled, key=lambda e: e.entropy, default=None))
