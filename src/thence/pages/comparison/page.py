"""The report of a comparison: page, terminal, and the same numbers as JSON and CSV."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from thence.compare.folder import CONTRASTS
from thence.compare.result import ALL_BASES, Arm, Comparison, read_results
from thence.compare.sections import sections_of
from thence.compare.statistics import Statistics, statistics
from thence.files import write_atomically
from thence.foreign_text import visible
from thence.pages.comparison.decided import contrasts_csv
from thence.pages.comparison.figures import section_figures
from thence.pages.comparison.numbers import report_json, runs_csv, summary_csv
from thence.pages.comparison.outcome import outcome
from thence.pages.comparison.tables import section_tables
from thence.pages.comparison.words import base_title, label, notes, registered_text, seeds_text
from thence.pages.figure import Figure
from thence.pages.table import Cell, Table, TableRow
from thence.pages.template import render

if TYPE_CHECKING:
    from rich.console import Console

TITLES: Mapping[str, str] = {
    "methods": "Methods",
    "waterfall": "Bugs fixed one at a time",
    "sensitivity": "Sensitivity to settings",
    "cost": "Cost",
    "short": "Short training",
    "score-against-flops": "Score against FLOPs",
    "training": "Loss and gradient norm",
    "dynamics": "RL over its steps",
    "tuning": "Tuning",
    "contrasts": "What was to be decided",
    "against-covariate": "Where the order turns",
}
IN_TERMINAL = frozenset({"contrasts", "against-covariate", "methods", "waterfall", "sensitivity", "short", "cost"})
_FOLDED = frozenset({"tuning"})
"""Kinds whose tables are long and read by few."""
_OVER_BLOCKS = frozenset({"contrasts", "against-covariate"})
"""Kinds that show nothing base by base."""


@dataclass(frozen=True)
class OfBase:
    """What a section shows of one base."""

    name: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class ShownSection:
    """A section, ready to be shown."""

    kind: str
    title: str
    note: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]
    pooled: str = ""
    """Title of what is over all bases; then what is of a single one is folded away. Empty: all are shown."""

    @property
    def shown(self) -> list[OfBase]:
        """Base by base, what is shown at once."""
        return [base for base in self.bases if not self.pooled or base.name == self.pooled]

    @property
    def away(self) -> list[OfBase]:
        """Base by base, what is folded away."""
        return [base for base in self.bases if self.pooled and base.name != self.pooled]

    @property
    def bases(self) -> list[OfBase]:
        """Figures and tables base by base; both have its name as their title, and none where they are over all."""
        own = [table for table in self.tables if not table.paper]
        names = dict.fromkeys(shown.title for shown in (*self.figures, *own))
        return [
            OfBase(
                name,
                tuple(figure for figure in self.figures if figure.title == name),
                tuple(table for table in own if table.title == name),
            )
            for name in names
        ]

    @property
    def papers(self) -> list[Table]:
        """Tables with a paper's own numbers."""
        return [table for table in self.tables if table.paper]


def write_page(folder: Path) -> Path:
    """Write ``report.html``, ``report.json``, ``runs.csv`` and ``summary.csv`` into a comparison's folder.

    Where there are contrasts, ``contrasts.csv`` too.

    The comparison may be unfinished.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no results in the folder.
        RecipeError: the recipe asks for a section that does not fit the comparison.
    """
    found = statistics(read_results(folder))
    page = folder / "report.html"
    if found.decisions.contrasts:
        write_atomically(folder / CONTRASTS, contrasts_csv(found))
    for path, text in (
        (folder / "report.json", report_json(found)),
        (folder / "runs.csv", runs_csv(found)),
        (folder / "summary.csv", summary_csv(found)),
        (page, render_page(found)),
    ):
        write_atomically(path, text)
    return page


def shown_sections(found: Statistics, figures: bool = True) -> list[ShownSection]:
    """The sections of a comparison with their tables and figures; those that have nothing to show are left out.

    Raises:
        RecipeError: a section does not fit the comparison.
    """
    parts = []
    for section in sections_of(found.comparison):
        drawn = tuple(section_figures(section, found)) if figures else ()
        tables = tuple(section_tables(section, found))
        by_base = section.kind not in (*_FOLDED, *_OVER_BLOCKS) and not section.bases
        pooled = found.comparison.is_pooled and by_base
        if drawn or tables:
            shown = ShownSection(section.kind, section.title or TITLES[section.kind], section.note, drawn, tables)
            parts.append(replace(shown, pooled=base_title(found, ALL_BASES) if pooled else ""))
    return parts


def render_page(found: Statistics) -> str:
    """The page as HTML. Raises RecipeError where a section does not fit the comparison."""
    comparison = found.comparison
    facts = {key: value for key, value in comparison.environment.items() if key != "command"}
    return render(
        "comparison",
        title=comparison.name,
        description=comparison.description,
        facts=_facts(found),
        outcome=outcome(found),
        notes=notes(found),
        bases=() if comparison.is_pooled else comparison.bases,
        parts=shown_sections(found),
        arms=Table("", ("Arm", "Starts from", "What it is"), tuple(_about(comparison, a) for a in comparison.arms)),
        failures=_failures(comparison),
        command=str(comparison.environment.get("command") or ""),
        environment=[(key, str(value)) for key, value in facts.items() if value not in (None, "", {})],
        replicates=f"{found.replicates:,}",
        folded=_FOLDED,
        decided=bool(found.decisions.contrasts),
    )


def _facts(found: Statistics) -> str:
    comparison = found.comparison
    parts = [f"{len(comparison.arms)} arms", f"{len(comparison.bases)} base{'s' if len(comparison.bases) > 1 else ''}"]
    registered = [said] if (said := registered_text(comparison)) else []
    return ", ".join([*parts, seeds_text(found), f"budget {comparison.budget}", *registered])


def _about(comparison: Comparison, arm: Arm) -> TableRow:
    faults = f"fault: {' and '.join(arm.fault)}" if arm.fault else ""
    cut = f"{arm.accumulation} micro-batches" if arm.fault and arm.accumulation else ""
    said = ", ".join(part for part in (arm.method or "nothing is trained", faults, cut, arm.note) if part)
    name = f"{label(arm)}, the reference" if arm.name == comparison.reference else label(arm)
    after = label(comparison.arm(arm.after)) if arm.after else "base"
    return TableRow(name, (Cell(after), Cell(said, arm.name)))


def _failures(comparison: Comparison) -> Table:
    rows = [
        TableRow(label(comparison.arm(failure.arm)), (Cell(failure.base), Cell(str(failure.seed)), Cell(failure.why)))
        for failure in comparison.failures
    ]
    return Table("", ("Arm", "Base", "Seed", "Why"), tuple(rows))


def print_comparison(found: Statistics, console: Console, kinds: Collection[str] = IN_TERMINAL) -> None:
    """Print outcome, notes and the tables of the sections of these kinds.

    Raises:
        RecipeError: a section does not fit the comparison.
    """
    from thence.pages.terminal import TableView

    def say(text: str, style: str = "") -> None:
        console.print(visible(text), style=style, markup=False, highlight=False)

    say(outcome(found))
    if registered := registered_text(found.comparison):
        say(registered, "dim")
    for note in notes(found):
        say(f"! {note}")
    for part in shown_sections(found, figures=False):
        if part.kind in kinds:
            console.print()
            say(part.title, "bold")
            tables = [table for base in part.shown for table in base.tables] + part.papers
            for table in tables:
                console.print(TableView(table))
            for note in dict.fromkeys(note for table in tables for note in table.notes):
                say(note, "dim")
    if found.comparison.failures:
        console.print()
        for failure in found.comparison.failures:
            say(f"failed: {failure.arm} on {failure.base}, seed {failure.seed}: {failure.why}")
