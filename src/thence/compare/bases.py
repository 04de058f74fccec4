"""The bases of a comparison: where each comes from, its seeds, and on which base its settings are tuned.

A block is one base with one seed: what is pretrained, if anything is, and all arms from there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

from pydantic import model_validator

from thence.errors import RecipeError, UserError
from thence.recipe import KINDS, Recipe, apply_overrides, kind_of, load_recipe, read_tables
from thence.settings.limits import Seed, Source, Text
from thence.settings.section import Section

_OF_THE_COMPARISON = ("name", "folder", "stages", "seed", "data.seed")
"""Fields of a pretraining recipe that a comparison sets for each base and seed."""


class Base(Section):
    """A model that arms start from."""

    path: Source | None = None
    """A folder, hub name or `world:chain/rich`; `{seed}` in it is the run's seed."""
    recipe: Source | None = None
    """A recipe that pretrains the base, instead of `path`. It runs once per seed, with that `seed` and `data.seed`."""
    settings: dict[str, Any] = {}
    """Changes to this recipe by dotted field: { "data.source" = ["world:chain?slip=0"], "sft.steps" = 2500 }."""
    seeds: list[Seed] | None = None
    """Seeds of the reported runs from this base. Empty: it is only tuned on. Default: the comparison's."""
    tuned_on: Text = ""
    """Another base: the values that tuning chose on it are used here, and nothing is tuned here."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.recipe is None):
            raise ValueError("give exactly one of path and recipe")
        if self.settings and self.recipe is None:
            raise ValueError("settings are changes to a recipe that pretrains the base: give recipe, or no settings")
        return self


def pretraining_recipe(base: Base) -> dict[str, Any]:
    """The tables of the recipe that pretrains a base, with the base's settings, and with training stages alone.

    Raises:
        RecipeError: there is no such recipe, or it makes no sense.
    """
    _, tables = read_tables(str(base.recipe))
    tables = apply_overrides(tables, base.settings)
    return apply_overrides(tables, {"stages": [name for name in load_recipe(tables).stages if kind_of(name) != "eval"]})


def check_bases(bases: Mapping[str, Base], seeds: Collection[int], tuned: bool, file: str | None) -> None:
    """Refuse bases that cannot be meant.

    Args:
        seeds: those of the comparison.
        tuned: whether an arm has a grid.
        file: of the comparison, for the error.

    Raises:
        RecipeError: `tuned_on` or `settings` that make no sense, or nothing that would be run.
    """
    for name, base in bases.items():
        for field, problem, remedy in (*_wrong_tuning(name, bases, tuned), *_wrong_settings(base)):
            raise RecipeError(problem, remedy=remedy, file=file, field=f"bases.{name}.{field}")
    if not any(seeds if base.seeds is None else base.seeds for base in bases.values()):
        problem, remedy = "no base has a seed, so nothing would be reported", "give one base a list of seeds"
        raise RecipeError(problem, remedy=remedy, file=file, field="bases")


def _wrong_tuning(name: str, bases: Mapping[str, Base], tuned: bool) -> Iterator[tuple[str, str, str]]:
    """Field, problem and remedy of what is wrong with where a base is tuned."""
    base = bases[name]
    if base.tuned_on:
        known = [other for other, table in bases.items() if other != name and not table.tuned_on]
        if base.tuned_on not in known:
            why = "which is tuned on another itself" if base.tuned_on in bases else "and there is no such base"
            why = "which is itself" if base.tuned_on == name else why
            offered = f"bases with values of their own are: {', '.join(known)}" if known else "leave it out"
            yield "tuned_on", f"the values are to be those of {base.tuned_on!r}, {why}", offered
    if base.seeds == [] and (base.tuned_on or not tuned):
        why = "its values are those of another base" if base.tuned_on else "no arm has a grid"
        yield "seeds", f"no run starts from it: it has no seeds, and {why}", "give it seeds, or leave the base out"


def _wrong_settings(base: Base) -> Iterator[tuple[str, str, str]]:
    """Field, problem and remedy of what is wrong with the changes to a base's recipe."""
    if not base.settings:
        return
    try:
        stages = load_recipe(str(base.recipe)).stages
    except UserError as error:
        yield "recipe", error.problem, error.remedy
        return
    training = [stage for stage in stages if kind_of(stage) != "eval"]
    for field, value in base.settings.items():
        table, dot, _ = field.partition(".")
        if field in _OF_THE_COMPARISON:
            yield f"settings.{field}", "the comparison sets it for each base and seed", "leave it out"
        elif not dot:
            what = "a whole table" if isinstance(value, Mapping) else "no field of a table"
            remedy = 'name single fields, in quotes: settings = { "data.limit" = 1000 }'
            yield f"settings.{field}", f"this is {what}", remedy
        elif kind_of(table) in KINDS and table not in training:
            problem = f"{table!r} is no training stage of {base.recipe}, so nothing would change"
            yield f"settings.{field}", problem, f"its training stages are: {', '.join(training)}"
    try:
        load_recipe(str(base.recipe), base.settings)
    except UserError as error:
        name = (error.field or "").removeprefix("--")
        yield f"settings.{name}" if name else "settings", error.problem, error.remedy


def recipe_of(base: Base) -> Recipe:
    """The recipe that pretrains a base, with its settings. Raises RecipeError."""
    return load_recipe(pretraining_recipe(base))
