"""A plan as tables for the terminal."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from thence.accounting.budget import Plan, StagePlan
from thence.accounting.memory import readable


def plan_view(plan: Plan) -> Group:
    """Budget, memory and assumptions of a plan, ready to print with rich."""
    parts = [_headline(plan), _budget(plan)]
    parts += [_memory(stage, plan.ranks) for stage in plan.stages if stage.memory is not None]
    if plan.assumptions:
        parts.append(Text("Assumed, because the data or the model has not been read:"))
        parts += [Text(f"  - {text}") for text in plan.assumptions]
    return Group(*parts)


def _headline(plan: Plan) -> Text:
    if plan.counts is None:
        return Text(f"{plan.model}: size not known")
    counts = plan.counts
    return Text(
        f"{plan.model}: {counts.total:,} parameters ({counts.matmul:,} in the layers' matrices, "
        f"{counts.embedding:,} in the embedding, {counts.head:,} in a separate head)"
    )


def _budget(plan: Plan) -> Table:
    table = Table(title="Budget", title_justify="left")
    table.add_column("stage")
    for name in ("optimizer steps", "tokens trained", "tokens generated", "FLOPs, 6N/8N rule", "FLOPs, exact"):
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.name,
            _whole(stage.optimizer_steps),
            _whole(stage.trained_tokens),
            _whole(stage.generated_tokens),
            _power(stage.rule_flops),
            _power(stage.exact_flops),
        )
    table.add_section()
    table.add_row(
        "training, all stages",
        _whole(plan.total("optimizer_steps")),
        _whole(plan.total("trained_tokens")),
        _whole(plan.total("generated_tokens")),
        _power(plan.total("rule_flops")),
        _power(plan.total("exact_flops")),
    )
    return table


def _memory(stage: StagePlan, ranks: int) -> Table:
    table = Table(title=f"Memory of {stage.name}, {'one rank' if ranks > 1 else 'estimate'}", title_justify="left")
    table.add_column("what")
    table.add_column("size", justify="right")
    table.add_column("when")
    table.add_column("arithmetic")
    assert stage.memory is not None
    for line in stage.memory.lines:
        table.add_row(line.name, readable(line.bytes), line.phase, line.arithmetic)
    table.add_section()
    table.add_row("peak", readable(stage.memory.peak), "", "always + the larger of training and rollout, plus a margin")
    return table


def _whole(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.0f}"


def _power(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
