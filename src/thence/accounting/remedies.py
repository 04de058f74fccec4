"""The smallest change with which a recipe fits: searched among its settings and the number of devices.

Every change that is found has been planned by the same arithmetic, fits by it, and is one that a run would take.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from thence.accounting.choices import (
    LEAST_MICRO_BATCH,
    Changes,
    LayoutEstimate,
    Planning,
    changed,
    estimated,
    heads_go,
    rows_that_fit,
    trained_stages,
)
from thence.accounting.hardware import MOST, Hardware
from thence.recipe import Optimization, Recipe, Rl

MOST_MOVES = 3
DOUBLINGS = 8
LORA_RANK = 16
SHORTEST = 256
"""Tokens of a response below which max_tokens is not cut."""


@dataclass(frozen=True, slots=True)
class Move:
    """One thing that can be changed.

    Args:
        what: what it is, for people.
        price: 0: memory and speed alone; 1: more devices; 2: other weights are trained, or responses cut.
        changes: fields that it sets; those of ``rows`` and ``micro`` follow from the plan.
        devices: how many devices it takes; 0: as many as there are.
    """

    what: str
    price: int
    changes: tuple[tuple[str, Any], ...] = ()
    devices: int = 0


ROWS = Move("fewer responses sampled in parallel", 0)
MICRO = Move("smaller micro-batches", 0)


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change with which everything fits.

    Args:
        moves: what is changed.
        estimate: the changed recipe on its hardware, planned.
    """

    moves: tuple[Move, ...]
    estimate: LayoutEstimate

    @property
    def keeps_result(self) -> bool:
        """Whether the run trains and samples the same."""
        return all(move.price < 2 for move in self.moves)


def remedies(recipe: Recipe, hardware: Hardware, planning: Planning) -> list[Remedy]:
    """The smallest changes with which a recipe fits that does not: all with the fewest moves, the cheapest first.

    Of changes with equally many moves those come first that leave the result alone and take no more devices, then more
    devices, then those that change what is trained. Empty: nothing that was tried makes it fit.
    """
    moves = list(_moves(recipe, hardware, planning))
    for count in range(1, MOST_MOVES + 1):
        found = []
        for chosen in itertools.combinations(moves, count):
            if _together(chosen) and (made := _tried(recipe, hardware, planning, chosen)) is not None:
                found.append(Remedy(chosen, made))
        if found:
            return sorted(found, key=lambda each: _cost(each, hardware))
    return []


def _cost(found: Remedy, hardware: Hardware) -> tuple[int, int, int, float]:
    seconds = found.estimate.seconds
    prices = [move.price for move in found.moves]
    return max(prices), found.estimate.hardware.ranks, sum(prices), seconds[1] if seconds else 0.0


def _together(moves: tuple[Move, ...]) -> bool:
    """Whether no two moves set the same field, and devices are added once."""
    fields = [name for move in moves for name, _ in move.changes]
    return len(set(fields)) == len(fields) and sum(move.devices > 0 for move in moves) < 2


def _tried(recipe: Recipe, hardware: Hardware, planning: Planning, moves: tuple[Move, ...]) -> LayoutEstimate | None:
    """The estimate with these moves where everything fits and a run would take it; else None."""
    changes: dict[str, Any] = {name: value for move in moves for name, value in move.changes}
    for move in moves:
        hardware = hardware.with_devices(move.devices) if move.devices else hardware
    if planning.refused(changed(recipe, changes), hardware):
        return None
    found = estimated(recipe, hardware, planning, changes)
    if MICRO in moves:
        smaller = _smaller_passes(recipe, hardware, planning, changes)
        if not smaller:
            return None
        changes |= smaller
        found = estimated(recipe, hardware, planning, changes)
    if ROWS in moves:
        rows = rows_that_fit(found)
        if not rows:
            return None
        found = estimated(recipe, hardware, planning, {**changes, **rows})
    return found if found.fits else None


def _smaller_passes(recipe: Recipe, hardware: Hardware, planning: Planning, changes: Changes) -> dict[str, Any]:
    """``micro_batch_tokens`` halved as often as it takes, in each stage whose training does not fit; {}: in vain."""
    smaller: dict[str, Any] = {}
    for name in trained_stages(recipe):
        stage = recipe.stage(name)
        assert isinstance(stage, Optimization)
        tokens = stage.micro_batch_tokens
        while not _trains(name, found := estimated(recipe, hardware, planning, {**changes, **smaller})):
            tokens //= 2
            before = next(each.micro_batch_tokens for each in found.plan.stages if each.name == name)
            if tokens < LEAST_MICRO_BATCH or before > 2 * tokens:  # the longest row stands alone already
                return {}
            smaller[f"{name}.micro_batch_tokens"] = tokens
    return smaller


def _trains(name: str, found: LayoutEstimate) -> bool:
    memory = next(stage.memory for stage in found.plan.stages if stage.name == name)
    return memory is None or memory.held("always") + memory.training <= found.room


def _moves(recipe: Recipe, hardware: Hardware, planning: Planning) -> Iterator[Move]:
    """Everything that may be changed, one at a time."""
    yield ROWS
    yield MICRO
    names, counts = trained_stages(recipe), planning.plan(recipe, hardware).counts
    stages = {name: recipe.stage(name) for name in names}
    again = tuple(
        (f"{name}.activation_checkpointing", True)
        for name, stage in stages.items()
        if getattr(stage, "activation_checkpointing", True) is not True
    )
    if again:
        yield Move("activations computed twice", 0, again)
    if any(getattr(stage, "checkpoint_async", False) for stage in stages.values()):
        yield Move("checkpoints written by the step", 0, tuple((f"{name}.checkpoint_async", False) for name in names))
    if names:
        yield from _shared(recipe, hardware)
    packed = all(getattr(stage, "packing", False) for stage in stages.values())
    for context in (2, 4, 8):
        if names and packed and counts and context > recipe.sharding.context and heads_go(counts, context):
            yield Move(f"{context} ranks share each row", 0, (("sharding.context", context),))
    for power in range(1, DOUBLINGS + 1):
        if (devices := hardware.ranks * 2**power) <= MOST and not hardware.device.on_host:
            yield Move(f"{devices:,} devices", 1, devices=devices)
    lora = recipe.model.lora
    if names and lora is None:
        yield Move("adapters trained instead of the weights (LoRA)", 2, (("model.lora.rank", LORA_RANK),))
    if names and (lora is None or lora.quantize is None):
        packed_up = (("model.lora.rank", LORA_RANK),) if lora is None else ()
        four = Move("the weights under adapters in 4 bits (QLoRA)", 2, (*packed_up, ("model.lora.quantize", "nf4")))
        yield four
    for share in (2, 4):
        cut = tuple(
            (f"{name}.max_tokens", stage.max_tokens // share)
            for name, stage in stages.items()
            if isinstance(stage, Rl) and stage.max_tokens // share >= SHORTEST
        )
        if cut:
            yield Move(f"responses cut at a {'half' if share == 2 else 'quarter'} of their length", 2, cut)


def _shared(recipe: Recipe, hardware: Hardware) -> Iterator[Move]:
    """Other ways of sharing the model."""
    if hardware.ranks > 1 and recipe.parallel != "fsdp2":
        one = (("sharding.replicas", 1),) if recipe.sharding.replicas > 1 else ()
        yield Move("weights cut over all ranks", 0, (("parallel", "fsdp2"), *one))
    if not recipe.sharding.reshard_after_forward:
        yield Move("weights freed after the forward pass", 0, (("sharding.reshard_after_forward", True),))
    if not recipe.sharding.sum_every_pass:
        yield Move("gradients summed after every pass", 0, (("sharding.sum_every_pass", True),))
    if not hardware.device.on_host and not recipe.sharding.offload:
        cut = () if recipe.parallel in ("fsdp2", "hsdp") else (("parallel", "fsdp2"),)
        yield Move("weights, gradients and moments in host memory", 0, (*cut, ("sharding.offload", True)))
