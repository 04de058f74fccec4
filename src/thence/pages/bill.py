"""What a recipe costs on given hardware, for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from thence.accounting.bill import Bill
from thence.accounting.choices import LayoutEstimate, as_flags
from thence.accounting.estimate import StageTime
from thence.accounting.memory import readable
from thence.accounting.planned import StagePlan
from thence.accounting.remedies import Remedy
from thence.pages.plan import budget_table, headline, memory_table, sent_table
from thence.pages.table import NOTHING, Cell, Table, TableRow
from thence.pages.terminal import TableView
from thence.wording import duration

SHOWN = 8
"""Layouts and further changes that are shown; all of them are in the JSON."""


def bill_view(bill: Bill, explain: bool = False, unread: str = "") -> Group:
    """The bill, ready to print with rich.

    Args:
        explain: with the arithmetic behind every figure.
        unread: why the data were not read; "": they were.
    """
    plan = bill.given.plan
    parts: list[Any] = [Text(f"{bill.recipe.name} on {bill.hardware}", "bold"), Text(headline(plan))]
    parts.append(TableView(budget_table(plan)))
    stages = [stage for stage in plan.stages if stage.memory is not None]
    if stages:
        parts.append(TableView(_memory(stages, bill.given)))
    parts.append(TableView(_times(bill.given)))
    parts += _verdict(bill)
    if bill.layouts:
        parts += _layouts(bill)
    if explain:
        parts += _explained(bill, stages)
    parts.append(Text("\nAssumed, because nothing of it was measured here", "bold"))
    if unread:
        parts.append(_point(f"the data were not read: {unread}"))
    parts += [_point(text) for text in bill.assumptions]
    parts.append(_point(f"figures of the device: {bill.hardware.device.source}"))
    return Group(*parts)


def _point(text: str) -> Padding:
    return _indented(Text(f"- {text}"), 2)


def _indented(text: Text, by: int) -> Padding:
    return Padding(text, (0, 0, 0, by), expand=False)


def _memory(stages: Sequence[StagePlan], found: LayoutEstimate) -> Table:
    """What a device holds, by kind and stage."""
    names = dict.fromkeys(line.name for stage in stages if stage.memory for line in stage.memory.lines)
    rows = []
    for name in names:
        cells = []
        for stage in stages:
            size = [line for line in stage.memory.lines if line.name == name] if stage.memory else []
            away = " (host)" if size and size[0].phase == "host" else ""
            cells.append(Cell(readable(sum(line.bytes for line in size)) + away) if size else NOTHING)
        rows.append(TableRow(name, tuple(cells)))
    peaks = tuple(
        Cell(readable(stage.memory.peak), strong=stage in found.too_large) for stage in stages if stage.memory
    )
    rows.append(TableRow("most at a time", peaks, apart=True))
    rows.append(TableRow("room", tuple(Cell(readable(found.room)) for _ in stages)))
    title = f"Memory of one device, {how(found)}"
    return Table(title, ("what", *(stage.name for stage in stages)), tuple(rows))


def _times(found: LayoutEstimate) -> Table:
    """Estimated times of the recipe as it is."""
    rows = []
    for time in found.times:
        step = NOTHING if time.step is None else Cell(_brief(time.step))
        speed = NOTHING if time.tokens_per_s is None else Cell(f"{time.tokens_per_s:,.0f}")
        rows.append(TableRow(time.name, (step, speed, Cell(_stage_hours(time)))))
    price = found.price
    whole = () if price is None else (TableRow("price", (NOTHING, NOTHING, Cell(_span(price, "{:,.0f}"))), apart=True),)
    rows.append(TableRow("all stages", (NOTHING, NOTHING, Cell(hours(found.seconds))), apart=True))
    title = "Estimated time, if it fitted" if found.too_large else "Estimated time"
    heads = ("stage", "a step, at most", "tokens/s", "time")
    return Table(title, heads, (*rows, *whole))


def _stage_hours(time: StageTime) -> str:
    if time.least is None or time.most is None:
        return f"not known: {', '.join(time.unknown)}"
    return hours((time.least, time.most))


def hours(seconds: tuple[float, float] | None) -> str:
    """A span of times in words."""
    if seconds is None:
        return "time not known"
    least, most = (_brief(value) for value in seconds)
    return least if least == most else f"{least} to {most}"


def _brief(seconds: float) -> str:
    """A time in words; milliseconds where a tenth of a second says nothing."""
    return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else duration(seconds)


def _span(values: tuple[float, float], pattern: str) -> str:
    least, most = (pattern.format(value) for value in values)
    return least if least == most else f"{least} to {most}"


def how(found: LayoutEstimate) -> str:
    """The layout in a few words."""
    plan, held = found.plan, found.plan.held
    parts = ["one rank" if plan.ranks == 1 and not held.cut else plan.layout]
    if plan.layout == "hsdp":
        parts.append(f"{plan.ranks // held.parts:,} copies of {held.parts:,} parts")
    if held.context > 1:
        parts.append(f"{held.context} ranks a row")
    if held.cut and held.offload:
        parts.append("in host memory")
    return ", ".join(parts)


def _verdict(bill: Bill) -> Iterator[Text | Padding]:
    found = bill.given
    if not bill.known:
        yield Text("Whether it fits is not known: the model cannot be counted.", "bold")
        return
    if found.fits:
        yield Text(f"It fits: {readable(found.peak)} of {readable(found.room)} at most.", "bold")
        return
    yield Text("It does not fit as it is.", "bold")
    for stage in found.too_large:
        assert stage.memory is not None
        always = stage.memory.held("always")
        needs = {"sampling": always + stage.memory.held("rollout"), "training": always + stage.memory.training}
        needs |= {"opening the model": stage.memory.held("loading")}
        over = [f"{what} needs {readable(size)}" for what, size in needs.items() if size > found.room]
        yield _point(f"{stage.name}: {', '.join(over)}; there is room for {readable(found.room)}")
    if not bill.remedies:
        yield Text("Nothing that was tried makes it fit: settings, adapters, 4 bits, shorter responses, more devices.")
        return
    first, *others = bill.remedies
    yield Text("The smallest change that makes it fit, planned and checked like the recipe itself:")
    yield from _remedy(first, bill)
    if others:
        yield Text("Others with as few changes:")
        for each in others[: SHOWN - 1]:
            yield from _remedy(each, bill)
        if len(others) >= SHOWN:
            yield _point(f"and {len(others) - SHOWN + 1} more: --json has all")


def _remedy(remedy: Remedy, bill: Bill) -> Iterator[Padding]:
    found = remedy.estimate
    what = " and ".join(move.what for move in remedy.moves)
    same = "" if remedy.keeps_result else "; it changes what is trained"
    yield _point(f"{what}{same}: {readable(found.peak)} at most, {hours(found.seconds)}{_price(found)}")
    if flags := as_flags(found.changes, bill.recipe):
        yield _indented(Text(flags, "cyan"), 4)


def _price(found: LayoutEstimate) -> str:
    return "" if found.price is None else f", price {_span(found.price, '{:,.0f}')}"


def _layouts(bill: Bill) -> Iterator[Any]:
    """The layouts that fit, and the flags of each."""
    rows = []
    for place, found in enumerate(bill.layouts[:SHOWN], start=1):
        price = () if found.price is None else (Cell(_span(found.price, "{:,.0f}")),)
        priced = price or ((NOTHING,) if bill.hardware.price is not None else ())
        rows.append(
            TableRow(f"{place}. {how(found)}", (Cell(readable(found.peak)), Cell(hours(found.seconds)), *priced))
        )
    heads = ("layout", "memory, at most", "time", *(("price",) if bill.hardware.price is not None else ()))
    yield TableView(
        Table(
            "Layouts that fit, the fastest first; of those alike in two digits the one with the fewest changes",
            heads,
            tuple(rows),
        )
    )
    yield Text("Their settings, beside those of the recipe:")
    for place, found in enumerate(bill.layouts[:SHOWN], start=1):
        flags = as_flags(found.changes, bill.recipe) or "as the recipe is"
        yield _indented(Text.assemble(f"{place}. ", (flags, "cyan")), 2)
    if len(bill.layouts) > SHOWN:
        yield _indented(Text(f"and {len(bill.layouts) - SHOWN} more: --json has all"), 2)


def _explained(bill: Bill, stages: Sequence[StagePlan]) -> Iterator[Any]:
    """The arithmetic of memory, messages and times."""
    plan = bill.given.plan
    yield Text("\nThe arithmetic", "bold")
    for stage in stages:
        yield TableView(memory_table(stage, plan))
    for stage in plan.stages:
        if stage.sent:
            yield TableView(sent_table(stage))
    for time in bill.given.times:
        rows = [
            TableRow(
                part.name, (Cell(_brief(part.seconds)), Cell("beside" if part.beside else ""), Cell(part.arithmetic))
            )
            for part in time.parts
        ]
        if rows:
            title = f"Time of {time.name}: what goes on beside the passes counts where it is longer than they are"
            yield TableView(Table(title, ("what", "time", "when", "arithmetic"), tuple(rows), words=(1, 2)))
