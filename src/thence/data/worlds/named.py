"""The embedded world by its name in a recipe: `world:chain`, with parameters as in `world:chain?question=0.6&slip=0`.

A split knows some parameters and no others. One that it does not know is refused: it would change nothing, silently.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping
from itertools import islice
from typing import Any

from thence.data.example import Example
from thence.data.worlds import chain
from thence.errors import DataError, RecipeError
from thence.settings.limits import Share
from thence.settings.section import Section
from thence.settings.validation import validated

WORLD = "world:chain"
PRETRAINING = "pretraining-"  # of a base, as a split: what the base was trained on
FIELD = "data.source"


class CorpusParameters(Section):
    """What may be asked of the split `pretraining-rich`."""

    question: Share = chain.MIX["rich"]["question"]
    """Share of the texts that are questions with hasty answers. The other kinds keep their proportions."""
    slip: Share = chain.SLIP
    """How often a step of these answers goes wrong."""


class ExpertParameters(Section):
    """What may be asked of the split `train`."""

    expert: chain.Expert = "mixed"
    """Who demonstrates. careful: in writing, every product split. hasty: mostly in the head or terse, never split."""
    wrong: Share = 0.0
    """Share of the demonstrations that end in a wrong answer, after one wrong step. The reference stays right."""
    calls: Share = 0.0
    """Share of the demonstrations that end at their first product, as a call of a calculator (docs/turns.md)."""


OF_SPLIT: Mapping[str, type[CorpusParameters] | type[ExpertParameters]] = {
    f"{PRETRAINING}rich": CorpusParameters,
    "train": ExpertParameters,
}


def is_of_world(source: str) -> bool:
    """Whether a data source is an embedded world, and no file and no data set on the hub."""
    return source.startswith("world:")


def world_examples(source: str, split: str, limit: int | None, seed: int) -> list[Example]:
    """The examples that a recipe's data table asks of the embedded world.

    Args:
        source: `world:chain`, with parameters or not.
        split: `train`, `dev`, `test`, `ood`, `pretraining-rich` or `pretraining-poor`.
        limit: how many.

    Raises:
        DataError: there is no such world, split or base, or no limit.
        RecipeError: a parameter is unknown, given twice, out of its range, or not one of this split.
    """
    asked = parameters_of(source, split)
    if limit is None:
        raise DataError(
            "the embedded world makes as many problems as asked", remedy="set data.limit", field="data.limit"
        )
    if split.startswith(PRETRAINING):
        base = split.removeprefix(PRETRAINING)
        if base not in ("rich", "poor"):
            raise DataError(
                f"no base {base!r}", remedy=f"use {PRETRAINING}rich or {PRETRAINING}poor", field="data.split"
            )
        corpus = asked if isinstance(asked, CorpusParameters) else CorpusParameters()
        questions = corpus.question if base == "rich" else None
        texts = islice(chain.pretraining(base, sys.maxsize, seed, questions, corpus.slip), limit)
        return [Example(prompt="", demonstration=text, source=f"{source}:{i + 1}") for i, text in enumerate(texts)]
    if split not in chain.SPLITS:
        known = ", ".join((*chain.SPLITS, f"{PRETRAINING}rich", f"{PRETRAINING}poor"))
        raise DataError(f"{WORLD} has no split {split!r}", remedy=f"use one of {known}", field="data.split")
    by = asked if isinstance(asked, ExpertParameters) else ExpertParameters()
    return [
        Example(
            prompt=p.prompt, demonstration=p.demonstration, answer=p.answer, source=f"{source}:{i + 1}", group=split
        )
        for i, p in enumerate(chain.problems(split, limit, seed, by.expert, by.wrong, by.calls))
    ]


def parameters_of(source: str, split: str) -> CorpusParameters | ExpertParameters | None:
    """The parameters in a source's name; None where it has none.

    Raises:
        DataError: there is no such world.
        RecipeError: a parameter is unknown, given twice, out of its range, or not one of this split.
    """
    name, mark, text = source.partition("?")
    if name != WORLD:
        raise DataError(f"no embedded world {name!r}", remedy=f"use {WORLD}", field=FIELD)
    if not mark:
        return None
    given = _given(source, text)
    kind = OF_SPLIT.get(split)
    known = [parameter for each in OF_SPLIT.values() for parameter in each.model_fields]
    for parameter in given:
        if parameter not in known:
            near = difflib.get_close_matches(parameter, known, n=1)
            raise RecipeError(
                f"{source}: {WORLD} has no parameter {parameter!r}",
                remedy=f"did you mean {near[0]!r}?" if near else _offered(),
                field=FIELD,
            )
        if kind is None or parameter not in kind.model_fields:
            raise RecipeError(
                f"{source}: the parameter {parameter!r} changes nothing in the split {split!r}",
                remedy=f"{_offered()}; set it for the stage that uses it, as in [sft] data = {{ source = ... }}, and "
                f"keep {WORLD} in [data]",
                field=FIELD,
            )
    assert kind is not None, "one parameter at least is given, and the split knows it"
    return validated(kind, given, FIELD)


def _given(source: str, text: str) -> dict[str, Any]:
    """The parameters as numbers and words. Raises RecipeError where the text is no list of them."""
    given: dict[str, Any] = {}
    for part in text.split("&"):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise RecipeError(
                f"{source}: {part!r} is no parameter with its value",
                remedy=f"write {WORLD}?question=0.6&slip=0",
                field=FIELD,
            )
        if name in given:
            raise RecipeError(f"{source}: {name!r} is given twice", remedy="give it once", field=FIELD)
        given[name] = _number(value)
    return given


def _number(text: str) -> float | str:
    """A number as such. Python would read 0_1 as 1 and skip blanks: these stay text, and are refused."""
    if not re.fullmatch(r"[+\-.0-9eE]+|nan|inf", text):
        return text
    try:
        return float(text)
    except ValueError:
        return text


def _offered() -> str:
    """Which splits have which parameters."""
    return "; ".join(f"{split} has {' and '.join(kind.model_fields)}" for split, kind in OF_SPLIT.items())
