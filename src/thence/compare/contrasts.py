"""What a comparison is to decide: named contrasts between arms, tested over blocks, and the power to decide them.

A block is a base with a seed. Every arm is run in every block on the same problems, so that the differences between
arms within a block say nothing of how much blocks differ::

    [covariate]                     # what tells blocks apart
    arm = "base"
    column = "skill"

    [[contrasts]]
    name = "sft-correct"
    arm = "sft"
    other = "sft-faulty"
    expect = "higher"
    equal_within = 0.02
    primary = true

:mod:`thence.compare.decisions` judges them, :mod:`thence.compare.power` says beforehand what they can decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import Discriminator, Field, Tag

from thence.compare.result import Column
from thence.errors import RecipeError
from thence.settings.limits import Name, PartShare, Share, Source, Text
from thence.settings.section import Section
from thence.wording import shown

Effect = Annotated[float, Gt(0), Le(1000)]
"""A difference of shares, or per unit of a covariate."""


class Covariate(Section):
    """What tells blocks (a base with a seed) apart: the accuracy of one arm, usually the one that trains nothing."""

    arm: Text
    """The arm whose accuracy is the covariate."""
    column: Text = ""
    """Test set, `split` or `split@temperature`; empty: the headline. Best one that no contrast reports."""
    title: Text = ""
    """What figures and tables call it. Default: the arm and the test set."""


class Contrast(Section):
    """A difference between two arms that the comparison is to decide."""

    name: Name
    """Its name in files."""
    says: Text = ""
    """What is expected, in a sentence. Default: arms and test set."""
    kind: Literal["difference", "slope"] = "difference"
    """difference: mean over blocks; slope: how the difference changes with the covariate, per unit of it."""
    arm: Text
    """The arm."""
    other: Text | list[Text]
    """The arm that is taken away; of a list, in each block the best one on `choose_on`."""
    choose_on: Text = ""
    """Test set on which the best of several others is chosen. No contrast may report it."""
    column: Text = ""
    """Test set, `split` or `split@temperature`; empty: the headline."""
    expect: Literal["higher", "lower", "equal"]
    """What the difference (or slope) is expected to be: above 0, below 0, or within `equal_within` of 0."""
    equal_within: Effect | None = None
    """Largest difference that means nothing, as a share (a slope: per unit of the covariate). Default: no bound."""
    blocks: Literal["all", "upper half", "lower half"] = "all"
    """Blocks that count: all, or those at and above (below) the median of the covariate."""
    adjust: Literal["none", "linear", "quadratic"] = "none"
    """Take out what a line (parabola) in the covariate explains: the mean over blocks with just these values of it."""
    primary: bool = False
    """Primary contrasts share Holm's correction. The others are exploratory, with Benjamini and Hochberg's."""
    effect: Effect | None = None
    """For --power: this contrast's own `effect`."""
    sd: Effect | None = None
    """For --power: an assumed spread of the blocks' true differences, instead of the pilot's."""

    @property
    def others(self) -> list[str]:
        """The arms that may be taken away."""
        return [self.other] if isinstance(self.other, str) else list(self.other)

    @property
    def degree(self) -> int:
        """Of the polynomial in the covariate that is taken out; 0: nothing is."""
        return {"none": 0, "linear": 1, "quadratic": 2}[self.adjust]

    @property
    def least_blocks(self) -> int:
        """Blocks without which nothing can be tested."""
        return self.degree + 3 if self.degree else 2


class AssumedSpread(Section):
    """A spread between blocks that no pilot has measured."""

    sd: Effect
    """Standard deviation of the blocks' true differences, as a share."""


def _table_or_path(value: object) -> str:
    """Which member an error speaks of; names in brackets are no part of a field's place."""
    return "[table]" if isinstance(value, Mapping | Section) else "[path]"


Pilot = Annotated[
    Annotated[Source, Tag("[path]")] | Annotated[AssumedSpread, Tag("[table]")], Discriminator(_table_or_path)
]


class Power(Section):
    """What is assumed and wanted when `thence compare FILE --power` computes the chance to decide."""

    pilot: Pilot | None = None
    """results.json (or the folder) of an earlier comparison, or an assumed spread: `{ sd = 0.1 }`."""
    names: dict[str, Text] = {}
    """What the pilot calls arms and test sets that it names differently, for example `{ sft-faulty = "both-8" }`."""
    effect: Effect = 0.05
    """Difference that must be found, as a share. A slope: how far the difference changes over the covariate's range."""
    target: Annotated[PartShare, Gt(0)] = 0.9
    """Wanted chance to find it."""
    span: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    """Range of the covariate over which planned blocks are spread evenly. Default: that of the pilot."""
    problems: Annotated[int, Gt(0), Le(10**6)] | None = None
    """Problems of each test set, where neither its `limit` nor the pilot tells."""


def find_column(name: str, columns: Sequence[Column]) -> Column | None:
    """A column by ``split`` or ``split@temperature``; empty: the headline. None where it is not measured."""
    if not name:
        return columns[0]
    return next((c for c in columns if name in (c.split, column_name(c))), None)


def column_name(column: Column) -> str:
    """How a file names a column."""
    return f"{column.split}@{column.temperature:g}"


def check_contrasts(
    covariate: Covariate | None,
    contrasts: Sequence[Contrast],
    arms: Mapping[str, Any],
    columns: Sequence[Column],
    blocks: int,
    kinds: Sequence[object] = (),
    file: str | None = None,
) -> None:
    """Refuse contrasts that cannot be tested.

    Args:
        arms: of the comparison, by name.
        columns: of the comparison; the first is the headline.
        blocks: how many the comparison plans.
        kinds: of the sections of its report.

    Raises:
        RecipeError: the first that is wrong, with its field and a remedy.
    """
    for place, kind in enumerate(kinds):
        needed = {"contrasts": "[[contrasts]]", "against-covariate": "[covariate]"}.get(str(kind))
        if needed and not (contrasts if kind == "contrasts" else covariate):
            problem, remedy = f"a section {kind} shows what no table {needed} names", f"add a table {needed}"
            raise RecipeError(problem, remedy=remedy, file=file, field=f"sections.{place}")
    for problem, remedy, field in _wrong(covariate, contrasts, list(arms), columns, blocks):
        raise RecipeError(problem, remedy=remedy, file=file, field=field)


def _wrong(
    covariate: Covariate | None,
    contrasts: Sequence[Contrast],
    arms: Sequence[str],
    columns: Sequence[Column],
    blocks: int,
) -> Iterator[tuple[str, str, str]]:
    known = f"columns are: {', '.join(map(column_name, columns))}"
    if covariate is not None:
        if covariate.arm not in arms:
            yield f"no arm {covariate.arm!r}", f"arms are: {', '.join(arms)}", "covariate.arm"
        if find_column(covariate.column, columns) is None:
            yield f"nothing is measured on {covariate.column!r}", known, "covariate.column"
    for one, other in combinations(contrasts, 2):
        if one.name == other.name:
            yield "two contrasts have this name", "give each its own name", f"contrasts.{one.name}.name"
    if contrasts and blocks < 2:
        yield (
            f"{blocks} block (a base with a seed) tells nothing about others",
            "plan at least two: give more seeds or bases; `thence compare FILE --power` says how many are enough",
            "contrasts",
        )
    reported = [find_column(contrast.column, columns) for contrast in contrasts]
    for contrast in contrasts:
        where = f"contrasts.{contrast.name}"
        for field, name in (("arm", contrast.arm), *(("other", name) for name in contrast.others)):
            if name not in arms:
                yield f"no arm {name!r}", f"arms are: {', '.join(arms)}", f"{where}.{field}"
        if contrast.arm in contrast.others:
            yield f"{contrast.arm!r} is compared with itself", "name another arm", f"{where}.other"
        for field, name in (("column", contrast.column), ("choose_on", contrast.choose_on)):
            if find_column(name, columns) is None:
                yield f"nothing is measured on {name!r}", known, f"{where}.{field}"
        chosen = find_column(contrast.choose_on, columns)  # at another temperature they are the same problems
        seen = chosen is not None and chosen.split in {column.split for column in reported if column is not None}
        yield from _wrong_choice(contrast, seen, where)
        yield from _wrong_use(contrast, covariate, blocks, where)
        if contrast.expect == "equal" and contrast.equal_within is None:
            yield (
                "nothing is ever shown to be exactly equal",
                "give equal_within, the largest difference that means nothing, for example 0.02",
                f"{where}.equal_within",
            )


def _wrong_use(
    contrast: Contrast, covariate: Covariate | None, blocks: int, where: str
) -> Iterator[tuple[str, str, str]]:
    """Of the covariate."""
    uses = {"kind": contrast.kind == "slope", "blocks": contrast.blocks != "all", "adjust": contrast.degree > 0}
    field = next((field for field, used in uses.items() if used), None)
    if covariate is None and field is not None:
        yield (
            f"{field} = {shown(getattr(contrast, field))} needs a covariate",
            "add a table [covariate] with the arm and the column that tell blocks apart",
            f"{where}.{field}",
        )
    if contrast.degree and contrast.kind == "slope":
        yield "a slope is of the covariate itself", "leave adjust out", f"{where}.adjust"
    counted = blocks if contrast.blocks == "all" else -(-blocks // 2)
    if contrast.degree and counted < contrast.least_blocks:
        problem = f"{counted} blocks are too few to take out what is {contrast.adjust} in the covariate"
        yield problem, f"plan at least {contrast.least_blocks}, or leave adjust out", f"{where}.adjust"


def _wrong_choice(contrast: Contrast, is_reported: bool, where: str) -> Iterator[tuple[str, str, str]]:
    if not contrast.others or len(set(contrast.others)) < len(contrast.others):
        problem = "an arm is named twice" if contrast.others else "the list is empty"
        yield problem, "name one arm, or several that differ", f"{where}.other"
    if len(contrast.others) > 1 and not contrast.choose_on:
        yield (
            "the best of several arms is chosen on a test set of its own",
            "give choose_on, a split of [eval] that no contrast reports",
            f"{where}.choose_on",
        )
    if len(contrast.others) == 1 and contrast.choose_on:
        yield "there is nothing to choose among", "name several arms in `other`", f"{where}.choose_on"
    if contrast.choose_on and is_reported:
        yield (
            f"the best arm is chosen on {contrast.choose_on!r}, which a contrast reports: its luck there would count",
            "choose on a split of [eval] that no contrast reports",
            f"{where}.choose_on",
        )
