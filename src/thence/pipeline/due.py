"""Rollout batches that are composed and not yet trained: what is known of them, and how a checkpoint holds them.

A checkpoint has their tokens and log-probabilities as tensors, 12 bytes a token, and the rest as JSON, for each rank
that composed a part. Prompts are not in it: they are those of the data, which a resumed run has compared.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from thence.data.trajectory import Prompt, Trajectory
from thence.errors import CheckpointError
from thence.files import to_json
from thence.pipeline.sampler import RolloutSampler
from thence.train.parallel import Ranks

PLACE = "ahead"
_PLAIN = ("origin", "score", "verdict", "finish", "text", "extracted", "reason", "prefix", "round", "version")


@dataclass(frozen=True)
class DueBatch:
    """This rank's part of a rollout batch that is composed.

    Args:
        step: of the stage that trains it, counted from 0.
        version: of the weights that it was sampled from: steps of the stage before.
        sampler: what it was composed with, and what that has seen.
        trajectories: what the method made of it.
        drawn: positions in the data after it: of prompts, of prompts with a demonstration.
        flops: executed for it outside of the trainer's meter; None: they cannot be counted.
        waited: seconds that its step waited for it.
        waited_before: seconds that the checkpoint before its step waited for batches.
    """

    step: int
    version: int
    sampler: RolloutSampler
    trajectories: list[Trajectory]
    drawn: tuple[int, int]
    flops: float | None = 0.0
    waited: float = 0.0
    waited_before: float = 0.0


class _Numbers:
    """Tuples of numbers, each kept once, in one row."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._known: dict[int, list[int]] = {}

    def add(self, given: Sequence[float] | None) -> list[int] | None:
        """Where these numbers are: first, and how many."""
        if given is None:
            return None
        if id(given) not in self._known:
            self._known[id(given)] = [len(self.values), len(given)]
            self.values += given
        return self._known[id(given)]


def packed(due: Sequence[DueBatch], ranks: Ranks) -> dict[str, Tensor]:
    """The batches of all ranks as tensors by name; empty: there are none. All ranks call it, with the same steps."""
    if not due:
        return {}
    tokens, logps = _Numbers(), _Numbers()
    plain = [_plain(batch, tokens, logps) for batch in due]
    mine = {
        "facts": torch.frombuffer(bytearray(to_json(plain).encode()), dtype=torch.uint8),
        "tokens": torch.tensor([*tokens.values, 0], dtype=torch.int32),  # never empty: not all readers take that
        "logps": torch.tensor([*logps.values, 0.0], dtype=torch.float64),
    }
    return {f"{PLACE}/{rank}/{kind}": part[kind] for rank, part in enumerate(ranks.gather(mine)) for kind in part}


def _plain(batch: DueBatch, tokens: _Numbers, logps: _Numbers) -> dict[str, Any]:
    def of(trajectory: Trajectory) -> dict[str, Any]:
        ids, prompt = tokens.add(trajectory.response_ids), trajectory.prompt
        where = {"prompt": [prompt.index, prompt.draw], "ids": ids, "logps": logps.add(trajectory.sampler_logps)}
        return {**where, "components": trajectory.components, **{name: getattr(trajectory, name) for name in _PLAIN}}

    return {
        "step": batch.step,
        "version": batch.version,
        "drawn": batch.drawn,
        "flops": batch.flops,
        "seconds": batch.sampler.seconds,
        "trajectories": [of(t) for t in batch.trajectories],
        "seen": [of(t) for t in batch.sampler.seen],
    }


def unpacked(tensors: Mapping[str, Tensor], sampler: RolloutSampler, ranks: Ranks) -> list[DueBatch]:
    """This rank's part of the batches of a checkpoint, in their order.

    With the number of ranks that composed them, each has its own part again; with another, whole groups are dealt anew
    in the order of their draws.

    Raises:
        CheckpointError: a prompt is none of the stage's.
    """
    world = len({name.split("/")[1] for name in tensors})
    prompts = {prompt.index: prompt for prompt in sampler.prompts}
    parts = [_of_rank(tensors, rank, prompts) for rank in range(world)]
    if not parts:
        return []
    found = []
    for at in range(len(parts[0])):
        own = [part[at] for part in parts]
        if world == ranks.world:
            mine, flops = own[ranks.rank], own[ranks.rank]["flops"]
        else:
            mine, flops = _dealt(own, ranks), None if own[0]["flops"] is None else sum(p["flops"] for p in own)
            flops = flops if ranks.rank == 0 or flops is None else 0.0
        again = copy.copy(sampler)
        again.step, again.seen, again.seconds = mine["step"], mine["seen"], mine["seconds"]
        drawn = (mine["drawn"][0], mine["drawn"][1])
        found.append(DueBatch(mine["step"], mine["version"], again, mine["trajectories"], drawn, flops))
    return found


def _of_rank(tensors: Mapping[str, Tensor], rank: int, prompts: Mapping[int, Prompt]) -> list[dict[str, Any]]:
    tokens, logps = (tensors[f"{PLACE}/{rank}/{kind}"].tolist() for kind in ("tokens", "logps"))

    def made(plain: dict[str, Any]) -> Trajectory:
        index, draw = plain.pop("prompt")
        if index not in prompts:
            raise CheckpointError(
                f"the checkpoint holds responses to prompt {index}, which is none of the stage's",
                remedy="resume with the data that the run was begun with, or --restart",
            )
        first, count = plain.pop("ids")
        place = plain.pop("logps")
        components = tuple((name, value) for name, value in plain.pop("components"))
        return Trajectory(
            replace(prompts[index], draw=draw),
            tuple(tokens[first : first + count]),
            sampler_logps=None if place is None else tuple(logps[place[0] : place[0] + place[1]]),
            components=components,
            **plain,
        )

    batches = json.loads(bytes(tensors[f"{PLACE}/{rank}/facts"].tolist()))
    return [
        {**batch, **{part: [made(plain) for plain in batch[part]] for part in ("trajectories", "seen")}}
        for batch in batches
    ]


def _dealt(own: Sequence[dict[str, Any]], ranks: Ranks) -> dict[str, Any]:
    """A rank's share of a batch that other ranks composed."""
    every = {part: [t for batch in own for t in batch[part]] for part in ("trajectories", "seen")}
    keys = sorted({(t.prompt.draw, t.prompt.index) for part in every.values() for t in part})
    mine = set(keys[ranks.rank :: ranks.world])
    taken = {
        part: sorted(
            (t for t in found if (t.prompt.draw, t.prompt.index) in mine), key=lambda t: (t.prompt.draw, t.prompt.index)
        )
        for part, found in every.items()
    }
    return {**own[0], "seconds": max(batch["seconds"] for batch in own), **taken}
