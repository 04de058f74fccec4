"""The report of a comparison: one HTML page that needs nothing else, and the same numbers as JSON and CSV."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from thence.compare.figures import section_figures
from thence.compare.numbers import report_json, runs_csv, summary_csv
from thence.compare.outcome import outcome
from thence.compare.result import Comparison, read_results
from thence.compare.sections import AnySection, sections_of
from thence.compare.statistics import Statistics, statistics
from thence.compare.svg import LIGHT, Figure
from thence.compare.tables import Table, section_tables
from thence.compare.words import label, notes, seeds_text
from thence.files import write_atomically
from thence.report.samples import visible

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
}
_DARK = ("#74b0e8", "#e8935a", "#6cc48f", "#c79be6", "#ef8386", "#d8b65a", "#5cc3cc", "#9aa0a6")
_FOLDED = frozenset({"tuning"})
"""Kinds whose tables are long and read by few."""
_DASHES = ("", "5 2", "1.5 1.5")


@dataclass(frozen=True)
class Part:
    """A section, ready to be shown."""

    kind: str
    title: str
    note: str
    figures: tuple[Figure, ...]
    tables: tuple[Table, ...]


def write_report(folder: Path) -> Path:
    """Write ``report.html``, ``report.json``, ``runs.csv`` and ``summary.csv`` into a comparison's folder.

    The comparison may be unfinished.

    Returns:
        The path of the page.

    Raises:
        UserError: there are no results in the folder.
        RecipeError: the recipe asks for a section that does not fit the comparison.
    """
    found = statistics(read_results(folder))
    page = folder / "report.html"
    for path, text in (
        (folder / "report.json", report_json(found)),
        (folder / "runs.csv", runs_csv(found)),
        (folder / "summary.csv", summary_csv(found)),
        (page, render(found)),
    ):
        write_atomically(path, text.encode("utf-8", "replace").decode("utf-8"))
    return page


def parts_of(found: Statistics, figures: bool = True) -> list[Part]:
    """The sections of a comparison with their tables and figures; those that have nothing to show are left out.

    Raises:
        RecipeError: a section does not fit the comparison.
    """
    parts = []
    for section in sections_of(found.comparison):
        drawn = tuple(section_figures(section, found)) if figures else ()
        tables = tuple(section_tables(section, found))
        if drawn or tables:
            parts.append(Part(section.kind, _title(section), section.note, drawn, tables))
    return parts


def _title(section: AnySection) -> str:
    return section.title or TITLES[section.kind]


def render(found: Statistics) -> str:
    """The page as HTML. Raises RecipeError where a section does not fit the comparison."""
    from jinja2 import Environment, StrictUndefined

    comparison = found.comparison
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: visible(value) if type(value) is str else value
    template = environment.from_string((resources.files("thence.compare") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=comparison.name,
        description=comparison.description,
        facts=_facts(found),
        outcome=outcome(found),
        notes=notes(found),
        parts=parts_of(found),
        arms=[_about(comparison, arm.name) for arm in comparison.arms],
        failures=[
            (label(comparison.arm(failure.arm)), failure.base, failure.seed, failure.why)
            for failure in comparison.failures
        ],
        environment=[(key, str(value)) for key, value in comparison.environment.items() if value not in (None, "", {})],
        replicates=found.replicates,
        light=LIGHT.series,
        dark=_DARK,
        dashes=_DASHES,
        folded=_FOLDED,
    )


def _facts(found: Statistics) -> str:
    comparison = found.comparison
    parts = [f"{len(comparison.arms)} arms", f"{len(comparison.bases)} base{'s' if len(comparison.bases) > 1 else ''}"]
    return ", ".join([*parts, seeds_text(found), f"budget {comparison.budget}"])


def _about(comparison: Comparison, name: str) -> dict[str, Any]:
    arm = comparison.arm(name)
    faults = f"fault: {' and '.join(arm.fault)}" if arm.fault else ""
    cut = f"{arm.accumulation} micro-batches" if arm.fault and arm.accumulation else ""
    said = ", ".join(part for part in (arm.method or "nothing is trained", faults, cut, arm.note) if part)
    return {
        "label": label(arm),
        "name": arm.name,
        "after": label(comparison.arm(arm.after)) if arm.after else "base",
        "said": said,
        "reference": name == comparison.reference,
    }
