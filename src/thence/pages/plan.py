"""What a run will cost, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from thence.accounting.memory import readable
from thence.accounting.planned import Plan, StagePlan
from thence.pages.table import Cell, Table, TableRow
from thence.pages.terminal import TableView
from thence.wording import duration

if TYPE_CHECKING:  # whose module imports torch, which a plan does without
    from thence.pipeline.foreseen import Compared

_TOTALS = ("optimizer_steps", "trained_tokens", "generated_tokens", "rule_flops", "exact_flops")
_HEADS = ("optimizer steps", "tokens trained", "tokens generated", "FLOPs, 6N/8N rule", "FLOPs, exact")


def plan_view(plan: Plan) -> Group:
    """Budget, memory and assumptions of a plan, ready to print with rich."""
    tables = [budget_table(plan)] + [memory_table(stage, plan) for stage in plan.stages if stage.memory is not None]
    tables += [sent_table(stage) for stage in plan.stages if stage.sent]
    parts = [Text(headline(plan)), *map(TableView, tables), *map(Text, fit_lines(plan))]
    if plan.assumptions:
        parts.append(Text("Assumed, because the data or the model has not been read:"))
        parts += [Text(f"  - {text}") for text in plan.assumptions]
    return Group(*parts)


def headline(plan: Plan) -> str:
    """The model and its size."""
    if plan.counts is None:
        return f"{plan.model}: size not known"
    counts = plan.counts
    return (
        f"{plan.model}: {counts.total:,} parameters ({counts.matmul:,} in the layers' matrices, "
        f"{counts.embedding:,} in the embedding, {counts.head:,} in a separate head)"
    )


def budget_table(plan: Plan) -> Table:
    """Steps, tokens and FLOPs of every stage."""
    rows = []
    for stage in plan.stages:
        least = stage.at_least or stage
        cells = tuple(_span(name, getattr(least, name), getattr(stage, name)) for name in _TOTALS)
        rows.append(TableRow(stage.name, cells))
    sums = tuple(_span(name, plan.total(name, at_least=True), plan.total(name)) for name in _TOTALS)
    return Table("Budget", ("stage", *_HEADS), (*rows, TableRow("training, all stages", sums, apart=True)))


def fit_lines(plan: Plan) -> list[str]:
    """The layout of training, and for each stage whether a rank has the memory that it needs."""
    if plan.counts is None:
        return []
    if plan.device_bytes is None:
        return [f"Layout: {_how(plan)}"]
    room = plan.device_bytes
    lines = [f"Layout: {_how(plan)}, {readable(room)} each"]
    for stage in plan.stages:
        if stage.memory is None:
            continue
        need = stage.memory.peak
        line = f"  {stage.name}: {readable(need)} of {readable(room)}"
        if need > room:
            line += ": does not fit" + "".join(f"; {way}" for way in _ways_out(stage, room))
        lines.append(line)
    return lines


def _ways_out(stage: StagePlan, room: float) -> Iterator[str]:
    """What makes a stage that does not fit smaller, where that is enough."""
    assert stage.memory is not None
    always = stage.memory.held("always")
    if always + stage.memory.held("rollout") > room:
        most = stage.most_rows(room)
        yield f"sampling fits with rollout_rows up to {most}" if most else "sampling does not fit with any rollout_rows"
    if always + stage.memory.training > room:
        yield "training needs a smaller micro_batch_tokens, activation_checkpointing, more ranks, or sharding.offload"


def _how(plan: Plan) -> str:
    return f"{plan.layout} over {plan.ranks} ranks" if plan.ranks > 1 else f"{plan.layout}, one rank"


def memory_table(stage: StagePlan, plan: Plan) -> Table:
    """What a rank holds in a stage, with the arithmetic."""
    assert stage.memory is not None
    rows = [
        TableRow(line.name, (Cell(readable(line.bytes)), Cell(line.phase), Cell(line.arithmetic)))
        for line in stage.memory.lines
    ]
    how = Cell("always + the larger of rollout and training (with the larger of loss and sum), plus a margin")
    rows.append(TableRow("peak", (Cell(readable(stage.memory.peak)), Cell(""), how), apart=True))
    title = f"Memory of {stage.name}, {f'one rank of {plan.ranks} ({plan.layout})' if plan.ranks > 1 else 'estimate'}"
    return Table(title, ("what", "size", "when", "arithmetic"), tuple(rows), words=(1, 2))


def sent_table(stage: StagePlan) -> Table:
    """What a rank sends, with the arithmetic."""
    rows = [TableRow(line.name, (Cell(readable(line.bytes)), Cell(line.arithmetic))) for line in stage.sent]
    title = f"Sent by a rank in one optimizer step of {stage.name}"
    return Table(title, ("what", "size", "arithmetic"), tuple(rows), words=(1,))


_QUANTITIES = {
    "rule_flops": "FLOPs, 6N/8N rule",
    "exact_flops": "FLOPs, exact",
    "trained_tokens": "tokens trained",
    "generated_tokens": "tokens sampled",
    "peak": "memory, at most",
    "seconds": "time, by its first 3 steps",
}


def compared_table(found: Sequence[Compared]) -> Table:
    """What was planned beside what was measured, stage by stage."""
    rows = []
    for each in found:
        planned, ratio = "not known", "–"
        if each.planned is not None:
            least, most = (_said(each.quantity, value) for value in each.planned)
            planned = most if least == most else f"{least} to {most}"
            if each.measured is not None and each.planned[0] == each.planned[1] > 0:
                ratio = f"{each.measured / each.planned[1]:.2f}"
        measured = "not known" if each.measured is None else _said(each.quantity, each.measured)
        cells = (Cell(planned), Cell(measured), Cell(ratio))
        rows.append(TableRow(_QUANTITIES[each.quantity], cells, group=each.stage))
    return Table("Planned and measured", ("what", "planned", "measured", "measured / planned"), tuple(rows))


def _said(quantity: str, value: float) -> str:
    if quantity == "peak":
        return readable(value)
    return duration(value) if quantity == "seconds" else _amount(quantity, value).text


def _span(name: str, low: float | None, high: float | None) -> Cell:
    """A figure; where a method's course decides, the least and the most."""
    most = _amount(name, high)
    if low is None or high is None or low == high:
        return most
    least, most = sorted((low, high))
    return Cell(f"{_amount(name, least).text} to {_amount(name, most).text}")


def _amount(name: str, value: float | None) -> Cell:
    if value is None:
        return Cell("not known")
    return Cell(f"{value:.3g}" if name.endswith("flops") else f"{value:,.0f}")
