"""The tables and figures that a recipe may ask for in the report of its comparison.

A section is a table of the recipe, told apart by its ``kind``::

    [[sections]]
    kind = "waterfall"
    title = "Bugs fixed one at a time"
    arms = ["sft-both", "sft-optimizer", "sft-aggregation", "sft"]
    paper = { source = "arXiv 2604.23747, Table 2", columns = ["avg"], rows = { "sft" = [54.0] } }
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Strict

from thence.compare.contrasts import column_name, find_column
from thence.compare.result import ALL_BASES, Arm, Column, Comparison
from thence.errors import RecipeError
from thence.settings.limits import Count, Seed, Signed, Text
from thence.settings.section import Section
from thence.settings.validation import validated


class Paper(Section):
    """Numbers of a paper, shown beside and never compared with: its models and data are others."""

    source: str
    """Where they stand, for example `arXiv 2604.23747, Table 2`."""
    columns: list[str] = Field(min_length=1)
    """Headings, unit included where it is not per cent."""
    rows: dict[str, list[Signed | Text]] = Field(min_length=1)
    """One value for each column, by arm (its title is shown) or by any other label; "" where there is none."""


class _Shown(Section):
    """What all sections have."""

    title: str = ""
    """Heading; empty: one that says what the section shows."""
    note: str = ""
    """A sentence for the reader, under the heading."""
    arms: list[str] = []
    """Which arms, in this order; empty: those that the kind of section is about."""
    bases: list[str] = []
    """Which bases; empty: all."""
    paper: Paper | None = None
    """The paper's own numbers, beside."""


class _Scored(_Shown):
    columns: list[str] = []
    """Test sets, `split` or `split@temperature`; empty: all."""


class Methods(_Scored):
    """Rows arms, columns test sets: mean and standard deviation, and the difference to the reference."""

    kind: Literal["methods"]


class Waterfall(_Scored):
    """Rows arms in order, bugs fixed one at a time: differences to the row above and to the clean arm."""

    kind: Literal["waterfall"]
    clean: str = ""
    """The arm without fault; empty: the last row."""


class Sensitivity(_Scored):
    """How the score depends on settings: a table of arms, or, where `x` is given, a line for each fault."""

    kind: Literal["sensitivity"]
    to: str = ""
    """The arm that differences are taken to; empty: the comparison's reference."""
    x: str = ""
    """Field on the horizontal axis: accumulation, or the name of a setting; empty: no figure."""


class Cost(_Shown):
    """Steps, tokens, FLOPs by the rule and as executed, seconds, and the headline score."""

    kind: Literal["cost"]


class Short(_Scored):
    """Pairs of a short and a long arm: what the rest of training bought."""

    kind: Literal["short"]
    pairs: list[Annotated[tuple[str, str], Strict(False)]] = Field(min_length=1)
    """Pairs of arms, the short one first."""


class ScoreAgainstFlops(_Shown):
    """Score over FLOPs, a panel for each base, with intervals."""

    kind: Literal["score-against-flops"]
    flops: Literal["rule", "executed"] = "rule"
    """rule: 6N a trained token and 2N a generated one; executed: with prompts, attention and skipped work."""
    column: str = ""
    """Test set, `split` or `split@temperature`; empty: the headline."""


class Curves(_Shown):
    """Lines over steps."""

    quantities: list[Literal["loss", "grad_norm", "reward", "response_tokens", "entropy"]] = []
    """Which; empty: those of the kind of section."""
    smooth: Count = 1
    """Steps averaged for a point; 1: as measured."""


class Training(Curves):
    """Loss and gradient norm of named arms over steps, one seed: what a bug looks like from outside."""

    kind: Literal["training"]
    seed: Seed | None = None
    """Which seed; empty: the first that each arm has."""


class Dynamics(Curves):
    """Reward, response length and entropy over RL steps: mean and range over seeds."""

    kind: Literal["dynamics"]


class TuningTable(_Shown):
    """What was tried on the dev split, and what was chosen."""

    kind: Literal["tuning"]


class Verdicts(_Shown):
    """The named contrasts with their verdicts, primary ones first."""

    kind: Literal["contrasts"]


class AgainstCovariate(_Scored):
    """Differences to an arm against the covariate, block by block: where the order of arms turns."""

    kind: Literal["against-covariate"]
    to: str = ""
    """The arm that differences are taken to; empty: the comparison's reference."""


_OfArms = Methods | Waterfall | Sensitivity | Cost | Short | ScoreAgainstFlops | Training | Dynamics | TuningTable
AnySection = _OfArms | Verdicts | AgainstCovariate

KINDS: Mapping[str, type[AnySection]] = {
    "methods": Methods,
    "waterfall": Waterfall,
    "sensitivity": Sensitivity,
    "cost": Cost,
    "short": Short,
    "score-against-flops": ScoreAgainstFlops,
    "training": Training,
    "dynamics": Dynamics,
    "tuning": TuningTable,
    "contrasts": Verdicts,
    "against-covariate": AgainstCovariate,
}
LINES = 8
"""Lines that a figure of training holds at most where the recipe does not choose them."""


def read_section(
    plain: Mapping[str, Any], arms: Iterable[str] = (), bases: Iterable[str] = (), where: str = "sections"
) -> AnySection:
    """Validate a section.

    Args:
        plain: its fields.
        arms, bases: names that it may use; empty: any.
        where: its place in the recipe, for the error.

    Raises:
        RecipeError: unknown kind, field, arm or base, or a value of the wrong type.
    """
    kind = KINDS.get(str(plain.get("kind")))
    if kind is None:
        raise RecipeError(
            f"no kind of section is called {plain.get('kind')!r}",
            remedy=f"kinds are: {', '.join(KINDS)}",
            field=f"{where}.kind",
        )
    section = validated(kind, plain, where, remedy=f"fields of {plain['kind']} are: {', '.join(kind.model_fields)}")
    _known(_arms_named(section), list(arms), "arm", where)
    _known(section.bases, list(bases), "base", where)
    if section.paper is not None:
        for label, values in section.paper.rows.items():
            if len(values) != len(section.paper.columns):
                raise RecipeError(
                    f"{len(values)} values for {len(section.paper.columns)} columns",
                    remedy='give one for each, "" where there is none',
                    field=f"{where}.paper.rows.{label}",
                )
    return section


def sections_of(comparison: Comparison) -> list[AnySection]:
    """The sections of a comparison as its recipe asks for them, or the default ones. Raises RecipeError."""
    names = [arm.name for arm in comparison.arms]
    plain = comparison.sections or default_sections(comparison)
    return [read_section(s, names, comparison.bases, f"sections.{index}") for index, s in enumerate(plain)]


def default_sections(comparison: Comparison) -> tuple[Mapping[str, Any], ...]:
    """What a recipe that names no sections gets; figures of training hold the first arms of each kind."""
    kinds = ["contrasts"] if comparison.contrasts else []
    kinds += ["against-covariate"] if comparison.covariate else []
    kinds += ["score-against-flops", "methods", "cost"]
    kinds += ["training"] if any(arm.kind == "sft" for arm in comparison.arms) else []
    kinds += ["dynamics"] if any(arm.kind == "rl" for arm in comparison.arms) else []
    return tuple({"kind": kind} for kind in [*kinds, "tuning"] if kind != "tuning" or comparison.tries)


def arms_of(section: AnySection, comparison: Comparison) -> list[Arm]:
    """The arms of a section: named ones in their order, else those that its kind is about, group by group."""
    if section.arms:
        return [comparison.arm(name) for name in section.arms]
    if isinstance(section, (Training, Dynamics)):
        stage = "sft" if isinstance(section, Training) else "rl"
        own = [arm for arm in comparison.arms if arm.kind == stage]
        return sorted(own, key=lambda arm: arm.name != comparison.reference)[:LINES]
    groups = list(dict.fromkeys(arm.group for arm in comparison.arms))
    return sorted(comparison.arms, key=lambda arm: groups.index(arm.group))


def bases_of(section: AnySection, comparison: Comparison) -> list[str]:
    """The bases of a section: named ones, else all that are reported; where there are many, first the mean over them.

    What was tuned is of all bases, those too that are only tuned on.
    """
    if section.bases:
        return list(section.bases)
    if isinstance(section, TuningTable):
        return list(comparison.bases)
    return [*([ALL_BASES] if comparison.is_pooled else []), *comparison.reported_bases]


def columns_of(section: AnySection, comparison: Comparison) -> list[Column]:
    """The columns of a section. Raises RecipeError where it names one that was not measured."""
    if isinstance(section, _Scored) and section.columns:
        return [column_named(name, comparison) for name in section.columns]
    return list(comparison.columns)


def column_named(name: str, comparison: Comparison) -> Column:
    """A column by ``split`` or ``split@temperature``; empty: the headline. Raises RecipeError."""
    if (column := find_column(name, comparison.columns)) is not None:
        return column
    known = ", ".join(map(column_name, comparison.columns))
    raise RecipeError(f"nothing was measured on {name!r}", remedy=f"columns are: {known}", field="sections.columns")


def _arms_named(section: AnySection) -> list[str]:
    named = list(section.arms)
    if isinstance(section, Waterfall) and section.clean:
        named.append(section.clean)
    if isinstance(section, Sensitivity | AgainstCovariate) and section.to:
        named.append(section.to)
    if isinstance(section, Short):
        named += [name for pair in section.pairs for name in pair]
    return named


def _known(names: Sequence[str], known: Sequence[str], what: str, where: str) -> None:
    for name in names:
        if known and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise RecipeError(
                f"no {what} is called {name!r}",
                remedy=f"did you mean {near[0]!r}?" if near else f"{what}s are: {', '.join(known)}",
                field=where,
            )
