"""Drawing random probes of reinforcement learning: rollouts, an objective, and how batches are dealt to steps."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

import torch

from tests.audit.mutation import END, FIRST_TOKEN, VOCABULARY
from thence.audit.policy.facts import Rollout
from thence.audit.policy.objective import PolicyObjective
from thence.audit.result import Case
from thence.faults import features as has
from thence.faults.fault import Fault
from thence.objective import Normaliser

LONGEST = 20.0
NORMALISERS = {
    "token-mean": Normaliser("tokens"),
    "sequence-mean": Normaliser("sequences"),
    "constant-divisor": Normaliser("sequences", LONGEST),
}


@dataclass(frozen=True)
class PolicyProbe:
    """One random probe.

    Args:
        asked: the objective.
        prompts, responses: token ids of every response of all rollout batches.
        rollouts: without the sampler's log-probabilities, which are made on the way.
        noise: added to the policy's log-probabilities to make the sampler's, one a response token;
            empty: none are given.
        steps: examples of every optimizer step.
        versions: optimizer steps taken before the rollout batch of each step was sampled.
    """

    case: Case
    asked: PolicyObjective
    prompts: tuple[tuple[int, ...], ...]
    responses: tuple[tuple[int, ...], ...]
    rollouts: tuple[Rollout, ...]
    noise: tuple[tuple[float, ...], ...]
    steps: tuple[tuple[int, ...], ...]
    versions: tuple[int, ...]
    budget: int
    dtype: torch.dtype
    seed: int

    @property
    def size(self) -> int:
        """Responses of one rollout batch."""
        return sum(rollout.batch == 0 for rollout in self.rollouts)


def any_probe(draw: random.Random, fault: Fault | None) -> PolicyProbe:
    wants = set(fault.needs.features) if fault is not None else set()
    asked = _objective(draw, wants, fault)
    size, groups = draw.choice((3, 4)), draw.choice((2, 2, 3))
    minis = draw.choice((1, 1, groups)) if has.WHOLE not in wants else 1
    generations = fault.needs.generations if fault is not None else draw.choice((1, 1, 2))
    least = fault.needs.steps if fault is not None else 1
    if generations > 1 and minis == 1 and fault is not None and fault.name in ("old-stale", "kl-to-old"):
        minis = groups
    iterations = 1 if generations > 1 else max(draw.choice((1, 2, 3)), -(-least // minis))
    count = size * groups * generations
    prompts, responses, rollouts, noise = _rollouts(draw, asked, wants, size, groups, generations)
    per_batch = size * groups
    steps, versions = [], []
    for batch in range(generations):
        first = len(steps)
        mine = list(range(batch * per_batch, (batch + 1) * per_batch))
        share = per_batch // minis
        for _ in range(iterations):
            for m in range(minis):
                steps.append(tuple(mine[m * share : (m + 1) * share]))
                versions.append(first)
    rows = len(steps[0])
    ranks = draw.choice([r for r in (1, 1, 2) if rows % r == 0])
    micro = draw.choice([m for m in (1, 2, 3) if rows % (m * ranks) == 0])
    case = Case(
        "drawn", micro, rows // (micro * ranks), ranks, examples=count, epochs=iterations, steps=len(steps),
asked=asked.normaliser,
    )  # fmt: skip
    dtype = torch.float64 if draw.random() < 0.2 else torch.float32
    return PolicyProbe(
        case, asked, prompts, responses, rollouts, noise, tuple(steps), tuple(versions), draw.randint(20, 120), dtype,
        draw.randrange(10**6),
    )  # fmt: skip


def _objective(draw: random.Random, wants: set[has.Feature], fault: Fault | None) -> PolicyObjective:
    sequence = has.SEQUENCE_RATIO in wants or (not wants & {has.CLIP, has.TOKENS, has.KL} and draw.random() < 0.15)
    low = draw.choice((0.05, 0.1, 0.2))
    normaliser = "token-mean" if has.TOKENS in wants else draw.choice(tuple(NORMALISERS))
    some = 0.0 if wants & {has.NO_KL, has.UNINFORMATIVE} or sequence else draw.choice((0.0, 0.0, 0.5))
    corrects = has.IMPORTANCE in wants or (fault is None and draw.random() < 0.3)
    return PolicyObjective(
        scale="group" if has.STD in wants else draw.choice(("none", "group")),
        ratio="sequence-token" if sequence else "token",
        clip_low=low,
        clip_high=2 * low if has.CLIP_HIGHER in wants else low * draw.choice((1.0, 1.0, 1.4)),
        dual_clip=1.5
        if has.DUAL_CLIP in wants
        else (draw.choice((math.inf, math.inf, 3.0)) if not sequence else math.inf),
        kl=draw.choice((1.0, 2.0)) if has.KL in wants else some,
        estimator="k3" if has.K3 in wants else draw.choice(("k3", "k3", "k2")),
        temperature=draw.choice((0.6, 0.8, 1.4)) if has.TEMPERATURE in wants else draw.choice((1.0, 1.0, 0.8)),
        correction="truncate" if corrects else "none",
        correction_cap=draw.choice((1.2, 2.0)) if corrects else math.inf,
        normaliser="sequence-mean" if sequence else normaliser,
        longest=LONGEST if normaliser == "constant-divisor" and not sequence else 0.0,
        truncated="mask" if has.MASKED in wants else _truncated(draw, fault),
        counted="informative" if has.UNINFORMATIVE in wants else "all",
    )


def _rollouts(draw: random.Random, asked: PolicyObjective, wants: set, size: int, groups: int, generations: int):
    tokens = range(FIRST_TOKEN, VOCABULARY)
    starts = draw.sample(tokens, groups * generations)
    equal = draw.randrange(groups) if wants & {has.UNINFORMATIVE, has.TOKENS} or draw.random() < 0.15 else -1
    truncates = has.MASKED in wants or (has.UNINFORMATIVE not in wants and draw.random() < 0.3)
    environments = has.ENVIRONMENT in wants or draw.random() < 0.25
    prompts, responses, rollouts, noise = [], [], [], []
    for group, start in enumerate(starts):
        prompt = (start, *draw.choices(tokens, k=draw.randint(1, 3)))
        rewards = _rewards(draw, size, group % groups == equal)
        for place in range(size):
            length = draw.choice((2, 3, 4, 6, 9))
            truncated = truncates and (draw.random() < 0.2 or (place == 1 and group % groups == 0))
            ids = draw.choices(tokens, k=length)
            responses.append(tuple(ids) if truncated else (*ids[:-1], END))
            between = range(1, length - 1)
            environment = tuple(sorted(draw.sample(between, min(2, len(between))))) if environments else ()
            environment = environment if draw.random() < 0.6 else ()
            prompts.append(prompt)
            rollouts.append(Rollout(rewards[place], group, group // groups, truncated, environment))
            noise.append(tuple(draw.gauss(0.0, 0.5) for _ in range(length)))
    return tuple(prompts), tuple(responses), tuple(rollouts), tuple(noise) if asked.correction != "none" else ()


def _rewards(draw: random.Random, size: int, equal: bool) -> list[float]:
    """Of one group: all the same, or no advantage near zero."""
    while True:
        found = [draw.choice((0.0, 0.3, 0.5, 0.8, 1.0, 2.0)) for _ in range(size)]
        if equal:
            return [found[0]] * size
        mean = sum(found) / size
        if min(abs(reward - mean) for reward in found) > 0.05:
            return found


def _truncated(draw: random.Random, fault: Fault | None) -> Literal["train", "mask"]:
    """Where the KL belongs in the reward, every response counts: thence has no reference of those that are masked."""
    chosen: Literal["train", "mask"] = draw.choice(("train", "train", "mask"))
    return "train" if fault is not None and fault.name == "kl-in-reward" else chosen
