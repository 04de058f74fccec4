"""What a run will cost, as tables for a terminal."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from thence.accounting.budget import Plan, StagePlan
from thence.accounting.memory import readable
from thence.pages.table import Cell, Table, TableRow
from thence.pages.terminal import TableView

_TOTALS = ("optimizer_steps", "trained_tokens", "generated_tokens", "rule_flops", "exact_flops")
_HEADS = ("optimizer steps", "tokens trained", "tokens generated", "FLOPs, 6N/8N rule", "FLOPs, exact")


def plan_view(plan: Plan) -> Group:
    """Budget, memory and assumptions of a plan, ready to print with rich."""
    tables = [_budget(plan)] + [_memory(stage, plan.ranks) for stage in plan.stages if stage.memory is not None]
    parts = [Text(_headline(plan)), *map(TableView, tables)]
    if plan.assumptions:
        parts.append(Text("Assumed, because the data or the model has not been read:"))
        parts += [Text(f"  - {text}") for text in plan.assumptions]
    return Group(*parts)


def _headline(plan: Plan) -> str:
    if plan.counts is None:
        return f"{plan.model}: size not known"
    counts = plan.counts
    return (
        f"{plan.model}: {counts.total:,} parameters ({counts.matmul:,} in the layers' matrices, "
        f"{counts.embedding:,} in the embedding, {counts.head:,} in a separate head)"
    )


def _budget(plan: Plan) -> Table:
    rows = [
        TableRow(stage.name, tuple(_amount(name, getattr(stage, name)) for name in _TOTALS)) for stage in plan.stages
    ]
    sums = tuple(_amount(name, plan.total(name)) for name in _TOTALS)
    return Table("Budget", ("stage", *_HEADS), (*rows, TableRow("training, all stages", sums, apart=True)))


def _memory(stage: StagePlan, ranks: int) -> Table:
    assert stage.memory is not None
    rows = [
        TableRow(line.name, (Cell(readable(line.bytes)), Cell(line.phase), Cell(line.arithmetic)))
        for line in stage.memory.lines
    ]
    how = Cell("always + the larger of training and rollout, plus a margin")
    rows.append(TableRow("peak", (Cell(readable(stage.memory.peak)), Cell(""), how), apart=True))
    title = f"Memory of {stage.name}, {'one rank' if ranks > 1 else 'estimate'}"
    return Table(title, ("what", "size", "when", "arithmetic"), tuple(rows), words=(1, 2))


def _amount(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell("not known")
    return Cell(f"{value:.3g}" if name.endswith("flops") else f"{value:,.0f}")
