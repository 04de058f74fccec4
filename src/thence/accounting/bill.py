"""The bill of a recipe on given hardware: what it needs and takes as it is, what makes it fit, and what is faster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from thence.accounting.choices import LayoutEstimate, Planning, different, estimated, layouts
from thence.accounting.estimate import StageTime
from thence.accounting.hardware import Hardware
from thence.accounting.planned import StagePlan
from thence.accounting.remedies import Remedy, remedies
from thence.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Bill:
    """What a recipe costs on some hardware.

    Args:
        recipe, hardware, planning: what was asked.
        given: the recipe as it is.
        remedies: the smallest changes that make it fit; empty where it fits, or where nothing was found.
        layouts: the ways of sharing the model that fit, the fastest first.
    """

    recipe: Recipe
    hardware: Hardware
    planning: Planning
    given: LayoutEstimate
    remedies: tuple[Remedy, ...]
    layouts: tuple[LayoutEstimate, ...]

    @property
    def known(self) -> bool:
        """Whether the model is one that can be counted."""
        return self.given.plan.counts is not None

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Everything that was assumed, in words."""
        share = self.planning.reserve
        room = f"{share:.0%} of a device's memory is left for libraries, fragmentation and their own buffers"
        found = [*self.given.plan.assumptions, room, *self.planning.rates.in_words()]
        if any(stage.memory and stage.memory.held("host") for stage in self.given.plan.stages):
            found.append(
                "the memory of the hosts is not known: whether it is enough for what lies there is not checked"
            )
        return tuple(found)


def make_bill(recipe: Recipe, hardware: Hardware, planning: Planning) -> Bill:
    """Plan a recipe on hardware, with the layouts that fit, and what makes it fit where it does not."""
    given = estimated(recipe, hardware, planning, {})
    small = () if given.fits or given.plan.counts is None else remedies(recipe, hardware, planning)
    ways = layouts(recipe, hardware, planning) if given.plan.counts is not None else []
    return Bill(recipe, hardware, planning, given, tuple(small), tuple(ways))


def bill_values(bill: Bill) -> dict[str, Any]:
    """The bill as plain values, for a program. What is not known is null."""
    device, plan = bill.hardware.device, bill.given.plan
    return {
        "recipe": bill.recipe.name,
        "model": plan.model,
        "parameters": None if plan.counts is None else plan.counts.total,
        "hardware": {
            "device": device.name,
            "devices": bill.hardware.ranks,
            "per_node": bill.hardware.per_node,
            "nodes": bill.hardware.nodes,
            "memory": device.memory,
            "peak": {str(size): value for size, value in device.peak},
            "bandwidth": device.bandwidth,
            "within_node": device.within,
            "between_nodes": device.between,
            "price_per_hour": bill.hardware.price,
            "source": device.source,
        },
        "rates": asdict(bill.planning.rates),
        "reserve": bill.planning.reserve,
        "as_given": _estimate(bill.given, bill.recipe, stages=True),
        "remedies": [
            {"changes": [move.what for move in each.moves], "keeps_result": each.keeps_result}
            | _estimate(each.estimate, bill.recipe)
            for each in bill.remedies
        ],
        "layouts": [_estimate(each, bill.recipe) for each in bill.layouts],
        "assumptions": list(bill.assumptions),
    }


def _estimate(found: LayoutEstimate, recipe: Recipe, stages: bool = False) -> dict[str, Any]:
    """One estimate; with ``stages``, all figures of each stage."""
    known = found.plan.counts is not None
    values: dict[str, Any] = {
        "settings": different(found.changes, recipe),
        "devices": found.hardware.ranks,
        "layout": found.plan.layout,
        "parts": found.plan.held.parts,
        "context": found.plan.held.context,
        "fits": found.fits if known else None,
        "too_large": [stage.name for stage in found.too_large],
        "peak": found.peak if known else None,
        "room": found.room,
        "seconds": _pair(found.seconds),
        "price": _pair(found.price),
        "times": [_seconds(time) for time in found.times],
    }
    return values | ({"stages": [_stage(stage) for stage in found.plan.stages]} if stages else {})


def _pair(values: Sequence[float] | None) -> dict[str, float] | None:
    return None if values is None else {"least": values[0], "most": values[1]}


def _seconds(time: StageTime) -> dict[str, Any]:
    seconds = None if time.least is None or time.most is None else (time.least, time.most)
    return {
        "stage": time.name,
        "seconds": _pair(seconds),
        "step": time.step,
        "tokens_per_s": time.tokens_per_s,
        "parts": [asdict(part) for part in time.parts],
        "unknown": list(time.unknown),
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    figures = {
        "optimizer_steps": stage.optimizer_steps,
        "trained_tokens": stage.trained_tokens,
        "generated_tokens": stage.generated_tokens,
        "rule_flops": stage.rule_flops,
        "exact_flops": stage.exact_flops,
        "executed": None if stage.executed is None else asdict(stage.executed),
    }
    memory = None
    if stage.memory is not None:
        memory = {"peak": stage.memory.peak, "lines": [asdict(line) for line in stage.memory.lines]}
    least = {} if stage.at_least is None else {"at_least": _stage(stage.at_least)}
    return {
        "name": stage.name,
        "kind": stage.kind,
        **figures,
        "memory": memory,
        "rollout_rows": stage.rollout_rows,
        "tokens_of_a_pass": stage.micro_batch_tokens,
        "sent": [asdict(sent) for sent in stage.sent],
        **least,
    }
