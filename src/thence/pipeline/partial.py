"""Partial rollouts (``rl.partial``): a batch holds the groups that end first, the others are resumed by later weights.

Without them a batch waits for its longest response. With them, ``in_flight`` prompts are sampled at once, more than the
``prompts`` of a batch. Every unfinished response gets ``chunk_tokens`` more tokens, until as many groups have ended as
a batch has; of those that have, the oldest are the batch. The rest stays in the pool, ended or not, with every token's
log-probability and the version of the weights that sampled it, and new prompts fill the pool up before the next batch.
So no response is thrown away for its length: a long one is trained later than a short one, and its tokens have
importance weights, as those of responses that were sampled ahead (``docs/partial.md``).

Which groups make a batch follows from the responses alone, never from how fast something was. The last batches ask for
fewer prompts, so that a stage that takes all its steps leaves nothing in the pool.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from thence.accounting.flops import rule_flops
from thence.data.order import stable_seed
from thence.data.trajectory import Prompt, Trajectory
from thence.errors import CheckpointError, RecipeError
from thence.files import to_json
from thence.methods.ahead import why_not_ahead
from thence.methods.base import Method
from thence.pipeline.context import StageContext
from thence.pipeline.due import PLACE, DueBatch
from thence.pipeline.sampled_from import sampled_from
from thence.pipeline.sampler import RolloutSampler
from thence.recipe import Rl
from thence.recipe.tables import PartialRollouts
from thence.rollout.native import Response, sample
from thence.rollout.responses import group_seeds
from thence.train.parallel import Ranks


@dataclass
class Begun:
    """A response that is being sampled, or has ended and waits for its batch.

    Args:
        seed: of its random numbers.
        token_ids, logps: of its tokens so far.
        versions: of the weights that sampled them, each with how many tokens.
        finish: stop or length; None: it goes on.
    """

    seed: int
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)
    finish: str | None = None

    def take(self, response: Response, version: int, longest: int, asked: int) -> None:
        """Append what was sampled, where so many tokens were asked for.

        One that has fewer and did not stop is at the end of what its engine can read, and ends there.
        """
        self.token_ids += response.token_ids
        self.logps += response.logps
        if self.versions and self.versions[-1][0] == version:
            self.versions[-1][1] += len(response.token_ids)
        else:
            self.versions.append([version, len(response.token_ids)])
        if response.finish == "stop" or len(self.token_ids) >= longest or len(response.token_ids) < asked:
            self.finish = response.finish


@dataclass
class Group:
    """The responses to one draw of a prompt.

    Args:
        number: of the draw, over the whole stage and all ranks: the smallest is the oldest.
        index: of its prompt.
    """

    number: int
    index: int
    responses: list[Begun]

    @property
    def has_ended(self) -> bool:
        """Whether all its responses have."""
        return all(response.finish is not None for response in self.responses)


@dataclass
class Partial:
    """The batches of a stage with partial rollouts. Every rank has the groups of the prompts that it was dealt."""

    context: StageContext
    stage: Rl
    sampler: RolloutSampler
    settings: PartialRollouts
    pool: list[Group] = field(default_factory=list)
    drawn: int = 0
    """Draws of prompts so far, over all ranks."""

    def begin(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Start after so many steps, with the pool that a checkpoint holds (:meth:`state`; empty: none)."""
        self.prompts = {prompt.index: prompt for prompt in self.sampler.prompts}
        self.pool, self.drawn = unpacked(tensors, self.prompts, self.context.ranks)

    def take(self, step: int) -> DueBatch:
        """The batch of a step, counted from 0: the oldest groups that have ended, as soon as there are enough."""
        sampler, prompts = self.sampler, self.stage.prompts
        with sampled_from(self.context, sampler.engine) as model:
            sampler.begin(step, model)
            self._fill(step)
            start = time.perf_counter()
            while len(ended := self._ended()) < prompts:
                self._sample_chunk(step)
        places = {number: place for place, number in enumerate(ended[:prompts])}
        mine = [group for group in self.pool if group.number in places]
        self.pool = [group for group in self.pool if group.number not in places]
        made = sampler.take_in([t for g in mine for t in self._trajectories(g, places[g.number])])
        sampler.seconds += time.perf_counter() - start
        return DueBatch(step, step, sampler, made, (sampler.drawn, sampler.expert_drawn))

    def state(self, done: int) -> dict[str, Tensor]:
        """What a checkpoint holds: the pool of all ranks. All ranks call it."""
        return packed(self.pool, self.drawn, self.context.ranks)

    def waste(self, done: int) -> dict[str, float]:
        """What is in the pool of all ranks where a stage ends before its last step; empty: nothing."""
        own = sum(len(response.token_ids) for group in self.pool for response in group.responses)
        tokens = self.context.ranks.sum_counts([own])[0]
        if not tokens:
            return {}
        return {"wasted_tokens": tokens, "wasted_flops": rule_flops(self.context.n_parameters, 0, tokens, 0)}

    def facts(self, batch: DueBatch) -> dict[str, float]:
        """What the line of a step says: ``staleness``, how many steps older than the policy the weights were that
        sampled a token, on average; ``resumed``, the share of responses that weights of several versions sampled;
        ``carried``, groups that are left in the pool."""
        ranks = self.context.ranks
        runs = [(batch.step - version, n) for t in batch.trajectories for version, n in _versions(t)]
        sums = [
            sum(lag * n for lag, n in runs),
            sum(n for _, n in runs),
            sum(bool(t.versions) for t in batch.trajectories),
            len(batch.trajectories),
            len(self.pool),
        ]
        lags, tokens, several, responses, carried = ranks.sum_counts(sums)
        return {"staleness": lags / max(tokens, 1), "resumed": several / max(responses, 1), "carried": carried}

    def _fill(self, step: int) -> None:
        """Draw prompts until enough are in flight."""
        sampler, ranks = self.sampler, self.context.ranks
        left = self.stage.prompts * (self.stage.steps - step)
        missing = min(self.settings.in_flight, left) - ranks.sum_counts([len(self.pool)])[0]
        if missing <= 0:
            return
        for prompt in sampler.next_prompts(missing):
            parts = (*self.context.seed_parts(), "rollout", sampler.drawn)
            again = sampler.again.get(prompt.group_key, 0)
            seeds = group_seeds(parts, prompt, self.stage.rollouts, again)
            self.pool.append(Group(self.drawn + prompt.draw, prompt.index, [Begun(seed) for seed in seeds]))
        self.drawn += missing

    def _ended(self) -> list[int]:
        """Numbers of the groups of all ranks that have ended, the oldest first."""
        own = [group.number for group in self.pool if group.has_ended]
        return sorted(number for part in self.context.ranks.gather(own) for number in part)

    def _sample_chunk(self, version: int) -> None:
        """Sample some more tokens of every response that goes on."""
        sampler, longest = self.sampler, self.sampler.sampling.max_tokens
        going = [(self.prompts[g.index], r) for g in self.pool for r in g.responses if r.finish is None]
        if not going:
            return
        read = [(*prompt.token_ids, *response.token_ids) for prompt, response in going]
        limits = [min(self.settings.chunk_tokens, longest - len(response.token_ids)) for _, response in going]
        starts = [len(response.token_ids) for _, response in going]
        seeds = [response.seed for _, response in going]
        if sampler.engine is None:
            found = sample(sampler.model, read, seeds, sampler.sampling, limits, starts)
        else:  # its random numbers begin anew with every request
            anew = [stable_seed(seed, at) if at else seed for seed, at in zip(seeds, starts, strict=True)]
            found = sampler.engine.sample(read, anew, sampler.sampling, limits)
        for (_, response), more, asked in zip(going, found, limits, strict=True):
            response.take(more, version, longest, asked)
        self.context.meter.sampled(read, [len(more.token_ids) for more in found])

    def _trajectories(self, group: Group, place: int) -> list[Trajectory]:
        prompt = replace(self.prompts[group.index], draw=place)
        return [
            Trajectory(
                prompt,
                tuple(begun.token_ids),
                finish=begun.finish or "length",
                sampler_logps=tuple(begun.logps),
                version=begun.versions[0][0],
                versions=tuple((v, n) for v, n in begun.versions) if len(begun.versions) > 1 else (),
            )
            for begun in group.responses
        ]


def _versions(trajectory: Trajectory) -> Sequence[tuple[int, int]]:
    if trajectory.versions or trajectory.version is None:
        return trajectory.versions
    return [(trajectory.version, len(trajectory.response_ids))]


def packed(pool: Sequence[Group], drawn: int, ranks: Ranks) -> dict[str, Tensor]:
    """The pools of all ranks as tensors by name. All ranks call it, and all get the same."""
    responses = [response for group in pool for response in group.responses]
    plain = [
        {
            "number": group.number,
            "index": group.index,
            "responses": [[r.seed, len(r.token_ids), r.versions, r.finish] for r in group.responses],
        }
        for group in pool
    ]
    mine = {
        "facts": torch.frombuffer(bytearray(to_json({"drawn": drawn, "groups": plain}).encode()), dtype=torch.uint8),
        "tokens": torch.tensor([*(i for r in responses for i in r.token_ids), 0], dtype=torch.int32),  # never empty
        "logps": torch.tensor([*(x for r in responses for x in r.logps), 0.0], dtype=torch.float64),
    }
    return {f"{PLACE}/{rank}/{kind}": part[kind] for rank, part in enumerate(ranks.gather(mine)) for kind in part}


def unpacked(tensors: Mapping[str, Tensor], prompts: Mapping[int, Prompt], ranks: Ranks) -> tuple[list[Group], int]:
    """This rank's pool of a checkpoint, and how many prompts had been drawn.

    With the number of ranks that wrote it, each has its own part again; with another, groups are dealt anew by age.

    Raises:
        CheckpointError: a prompt is none of the stage's.
    """
    parts: list[list[Group]] = []
    drawn = 0
    for rank in range(len({name.split("/")[1] for name in tensors})):
        facts, tokens, logps = (tensors[f"{PLACE}/{rank}/{kind}"].tolist() for kind in ("facts", "tokens", "logps"))
        said = json.loads(bytes(facts))
        drawn, at, groups = said["drawn"], 0, []
        for plain in said["groups"]:
            if plain["index"] not in prompts:
                raise CheckpointError(
                    f"the checkpoint holds responses to prompt {plain['index']}, which is none of the stage's",
                    remedy="resume with the data that the run was begun with, or --restart",
                )
            responses = []
            for seed, size, versions, finish in plain["responses"]:
                responses.append(Begun(seed, tokens[at : at + size], logps[at : at + size], versions, finish))
                at += size
            groups.append(Group(plain["number"], plain["index"], responses))
        parts.append(groups)
    if len(parts) == ranks.world:
        return parts[ranks.rank], drawn
    every = sorted((group for part in parts for group in part), key=lambda group: group.number)
    return every[ranks.rank :: ranks.world], drawn


def check_partial(name: str, stage: Rl, method: Method) -> None:
    """Refuse partial rollouts where they would change what the method does, or cannot be done.

    Raises:
        RecipeError: they are refused.
    """
    if stage.partial is None:
        return
    why = why_not_ahead(type(method))
    if why is None and type(method).compose is not Method.compose:
        why = "it composes its batches itself, and with partial rollouts a batch is the groups that end first"
    if why is None and stage.ahead:
        why = "its batches are sampled ahead: set ahead = 0"
    if why is None and stage.environment is not None:
        why = "a rollout of several turns cannot be left in the middle: its environment would wait"
    if why is None and stage.fault is not None:
        why = "a fault is a change of the step on responses of the newest policy, and these may have begun before"
    if why is not None:
        raise RecipeError(
            f"{stage.method} cannot train partial rollouts here: {why}",
            remedy="leave rl.partial out, or see docs/partial.md for the methods and settings that can",
            field=f"{name}.partial",
        )
