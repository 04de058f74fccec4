"""The layouts that a recipe can have on given hardware: which fit, and how long they are estimated to take.

Only settings of the recipe are tried, and only those that change memory and speed, and never the update. What a run
would refuse is not listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thence.accounting.estimate import Rates, StageTime, stage_times, total_seconds
from thence.accounting.flops import Counts
from thence.accounting.hardware import Hardware
from thence.accounting.planned import Plan, StagePlan
from thence.recipe import Lora, Optimization, Recipe

Changes = Mapping[str, Any]
"""Fields of a recipe by their dotted names, with the values that they get."""
MICRO_BATCHES = (0.25, 1, 4)
"""Shares of the recipe's own micro_batch_tokens that are tried."""
LEAST_MICRO_BATCH = 256
CONTEXTS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Planning:
    """How recipes are planned here.

    Args:
        plan: makes the plan of a recipe on hardware, with what is known of model and data.
        refused: why a run would refuse the recipe on it, in words; "": it would not.
        rates: what is assumed of speeds.
        reserve: share of a device's memory that is left for libraries, fragmentation and their own buffers.
    """

    plan: Callable[[Recipe, Hardware], Plan]
    refused: Callable[[Recipe, Hardware], str]
    rates: Rates
    reserve: float

    def room(self, hardware: Hardware) -> float:
        """Bytes of a device that a stage may hold."""
        return (hardware.device.memory or math.inf) * (1 - self.reserve)


@dataclass(frozen=True, slots=True)
class LayoutEstimate:
    """A recipe with some changes on some hardware: what it needs, and what it takes.

    Args:
        changes: of the recipe as it was given.
        hardware: what it is planned for.
        plan, times: of the changed recipe.
        room: bytes of a device that a stage may hold.
        differing: how many of the changes say something else than the recipe.
    """

    changes: Changes
    hardware: Hardware
    plan: Plan
    times: tuple[StageTime, ...]
    room: float
    differing: int = 0

    @property
    def too_large(self) -> tuple[StagePlan, ...]:
        """The stages that do not fit."""
        return tuple(stage for stage in self.plan.stages if stage.memory is not None and stage.memory.peak > self.room)

    @property
    def fits(self) -> bool:
        """Whether every stage fits; False where the model is not known."""
        return self.plan.counts is not None and not self.too_large

    @property
    def peak(self) -> int:
        """Bytes of a device at the worst moment of all stages."""
        return max((stage.memory.peak for stage in self.plan.stages if stage.memory is not None), default=0)

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Least and most; None: not known."""
        return total_seconds(self.times)

    @property
    def price(self) -> tuple[float, float] | None:
        """Least and most, in the currency of the price; None: not known, or no price was given."""
        if self.hardware.price is None or self.seconds is None:
            return None
        each = self.hardware.price * self.hardware.ranks / 3600
        return self.seconds[0] * each, self.seconds[1] * each


def changed(recipe: Recipe, changes: Changes) -> Recipe:
    """The recipe with these fields; their values are not validated here: :func:`thence.recipe.load_recipe` does."""
    of_table: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        table, dot, key = name.rpartition(".")
        of_table.setdefault(table if dot else "", {})[key] = value
    top, tables = dict(of_table.pop("", {})), dict(recipe.tables)
    if lora := of_table.pop("model.lora", None):
        before = recipe.model.lora
        of_table.setdefault("model", {})["lora"] = Lora(**lora) if before is None else before.model_copy(update=lora)
    for table, values in of_table.items():
        if table in tables:
            tables[table] = tables[table].model_copy(update=values)
        else:
            top[table] = getattr(recipe, table).model_copy(update=values)
    return recipe.model_copy(update={**top, "tables": tables})


def estimated(recipe: Recipe, hardware: Hardware, planning: Planning, changes: Changes) -> LayoutEstimate:
    """What a recipe with these changes needs and takes."""
    plan = planning.plan(changed(recipe, changes), hardware)
    times = stage_times(plan, hardware, planning.rates)
    room, differing = planning.room(hardware), len(different(changes, recipe))
    return LayoutEstimate(dict(changes), hardware, plan, times, room, differing)


def layouts(recipe: Recipe, hardware: Hardware, planning: Planning) -> list[LayoutEstimate]:
    """The layouts that fit, the fastest first: of each way of sharing the model, the fastest of its settings.

    Those whose time is not known come last, with the smallest first.
    """
    best: dict[tuple[Any, ...], LayoutEstimate] = {}
    counts = planning.plan(recipe, hardware).counts
    for sharding in _shardings(recipe, hardware, counts):
        if planning.refused(changed(recipe, sharding), hardware):
            continue
        found = _fastest(recipe, hardware, planning, sharding)
        key = tuple(sharding.get(name) for name in ("parallel", "sharding.replicas", "sharding.context"))
        key += (sharding.get("sharding.offload"),)
        if found is not None and (key not in best or _rank(found) < _rank(best[key])):
            best[key] = found
    return sorted(best.values(), key=_rank)


def _rank(found: LayoutEstimate) -> tuple[float, int, float, int]:
    """By time; estimates that are the same in two digits by how many settings differ from the recipe's."""
    seconds = found.seconds
    most = math.inf if seconds is None else seconds[1]
    return (float(f"{most:.2g}"), found.differing, most, found.peak)


def trained_stages(recipe: Recipe) -> list[str]:
    """The names of the stages that train."""
    return [name for name in recipe.stages if isinstance(recipe.stage(name), Optimization)]


def _shardings(recipe: Recipe, hardware: Hardware, counts: Counts | None) -> Iterator[dict[str, Any]]:
    """Every way in which the ranks can share the model and its rows."""
    ranks = hardware.ranks
    switches = list(itertools.product((True, False), (True, False)))
    for context in _contexts(recipe, hardware, counts):
        shared = {"sharding.context": context, "sharding.replicas": 1}
        own = context == recipe.sharding.context
        away = (False, True) if own and not hardware.device.on_host else (False,)
        yield shared | {"parallel": "none" if ranks == 1 else "ddp", **_whole(recipe)}
        for offload in away if ranks == 1 else ():
            if offload:
                yield shared | {"parallel": "fsdp2", "sharding.offload": True}
        for replicas in _replicas(hardware) if ranks > 1 else ():
            parallel = "fsdp2" if replicas == 1 else "hsdp"
            for (reshard, every), offload in itertools.product(switches, away):
                yield shared | {
                    "parallel": parallel,
                    "sharding.replicas": replicas,
                    "sharding.reshard_after_forward": reshard,
                    "sharding.sum_every_pass": every,
                    "sharding.offload": offload,
                }


def _whole(recipe: Recipe) -> dict[str, Any]:
    """What must not stand in a recipe whose weights are not cut, since it would say what does not happen."""
    return {"sharding.offload": False} if recipe.sharding.offload else {}


def _contexts(recipe: Recipe, hardware: Hardware, counts: Counts | None) -> Iterator[int]:
    """Ranks that can share rows: packed ones, and with heads that can be dealt to them."""
    packed = all(getattr(recipe.stage(name), "packing", False) for name in trained_stages(recipe))
    for context in sorted({*CONTEXTS, recipe.sharding.context}):
        if context == 1 or (
            packed and counts and trained_stages(recipe) and not hardware.ranks % context and heads_go(counts, context)
        ):
            yield context


def heads_go(counts: Counts, context: int) -> bool:
    """Whether a model's attention heads can be dealt to ranks that share rows: see thence.models.ulysses."""
    return not counts.heads % context and not (counts.kv_heads % context and context % counts.kv_heads)


def _replicas(hardware: Hardware) -> list[int]:
    """1: weights cut over all ranks. Others: groups with a copy each, of a node or of parts and multiples of one."""
    ranks = hardware.ranks
    found = {1, hardware.nodes} | {2**power for power in range(1, 13)}
    return sorted(n for n in found if not ranks % n and n < ranks)


def _fastest(recipe: Recipe, hardware: Hardware, planning: Planning, sharding: Changes) -> LayoutEstimate | None:
    """The fastest settings of the stages with which this sharding fits; None: it fits with none."""
    names = trained_stages(recipe)
    options: dict[str, list[tuple[tuple[float, int, int], dict[str, Any]]]] = {name: [] for name in names}
    own_again = {getattr(recipe.stage(name), "activation_checkpointing", False) for name in names}
    tried = (None, *(again for again in (False, True) if own_again != {again}))
    for again, share in itertools.product(tried, MICRO_BATCHES):
        changes = {**sharding}
        own = {name: _stage_changes(recipe, name, again, share) for name in names}
        for each in own.values():
            changes |= each
        found = with_rows(recipe, hardware, planning, changes)
        too_large = {stage.name for stage in found.too_large}
        if any(name not in names for name in too_large) or found.plan.counts is None:
            return None  # an evaluation does not fit, whatever training does
        for time in found.times:
            if time.name in options and time.name not in too_large:
                most = math.inf if time.most is None else time.most
                options[time.name].append(
                    ((round(most, 6), len(own[time.name]), abs(int(4 * share) - 4)), own[time.name])
                )
    if not all(options.values()):
        return None
    chosen = {**sharding}
    for name in names:
        chosen |= min(options[name], key=lambda option: option[0])[1]
    found = with_rows(recipe, hardware, planning, chosen)
    return found if found.fits and not planning.refused(changed(recipe, found.changes), hardware) else None


def _stage_changes(recipe: Recipe, name: str, again: bool | None, share: float) -> dict[str, Any]:
    """Settings of a stage that are not those of the recipe."""
    stage, found = recipe.stage(name), {}
    assert isinstance(stage, Optimization)
    tokens = max(LEAST_MICRO_BATCH, int(stage.micro_batch_tokens * share))
    if tokens != stage.micro_batch_tokens:
        found[f"{name}.micro_batch_tokens"] = tokens
    if again is not None and again != stage.activation_checkpointing:
        found[f"{name}.activation_checkpointing"] = again
    return found


def with_rows(recipe: Recipe, hardware: Hardware, planning: Planning, changes: Changes) -> LayoutEstimate:
    """The estimate with as many responses in parallel as fit, where those of the recipe do not."""
    found = estimated(recipe, hardware, planning, changes)
    rows = rows_that_fit(found)
    return estimated(recipe, hardware, planning, {**changes, **rows}) if rows else found


def rows_that_fit(found: LayoutEstimate) -> dict[str, Any]:
    """``rollout_rows`` of the stages whose sampling does not fit as it is, and fits with fewer."""
    rows = {}
    for stage in found.too_large:
        assert stage.memory is not None
        if stage.memory.held("always") + stage.memory.held("rollout") > found.room and (
            most := stage.most_rows(found.room)
        ):
            rows[f"{stage.name}.rollout_rows"] = most
    return rows


def as_flags(changes: Changes, recipe: Recipe) -> str:
    """Changes as flags of a command; those that say what the recipe says already are left out."""
    flags = []
    for name, value in changes.items():
        if _value_in(recipe, name) != value:
            text = str(value).lower() if isinstance(value, bool) else str(value)
            flags.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(flags)


def different(changes: Changes, recipe: Recipe) -> dict[str, Any]:
    """The changes that do not say what the recipe says already."""
    return {name: value for name, value in changes.items() if _value_in(recipe, name) != value}


def _value_in(recipe: Recipe, name: str) -> Any:
    table, dot, key = name.rpartition(".")
    if not dot:
        return getattr(recipe, name)
    at: Any = recipe.tables.get(table, recipe)
    for part in () if table in recipe.tables else table.split("."):
        at = getattr(at, part, None)
    return getattr(at, key, None)


def names_of(stages: Sequence[StagePlan]) -> str:
    """Stages in words."""
    return ", ".join(stage.name for stage in stages)
