"""The heat map of a report, laid out: a column a token, a row an optimizer step of a case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from thence.audit.figures import place, zero_bound
from thence.audit.report import Report
from thence.audit.result import RESPONSE_ROLES, SequenceWeights, StepResult, TokenWeight
from thence.foreign_text import visible

SHADES = 12
"""Shades on either side of the ideal."""
LARGEST = 8.0
"""Ratios beyond this one, or below its inverse, have the darkest shade."""


@dataclass(frozen=True)
class TokenColumn:
    """A token, or a whole prompt in one where no case trains prompts.

    Args:
        letter: for the head; a box if the token is not one character.
        text: the token, or how many tokens of a prompt are meant.
    """

    letter: str
    text: str
    role: str


@dataclass(frozen=True)
class ExampleColumns:
    """The columns of one example.

    Args:
        number: from 1.
        asked: columns before the response.
        trained: tokens of the response.
    """

    number: int
    columns: tuple[TokenColumn, ...]
    asked: int
    trained: int


@dataclass(frozen=True)
class Block:
    """One example in one row.

    Args:
        shades: a class of the page's style sheet a column.
        begins: whether another micro-batch begins here.
        label: its micro-batch, where one begins.
        apart: whether no line joins it to others: not in this step, or its micro-batch is not known.
    """

    shades: tuple[str, ...]
    begins: bool = False
    label: str = ""
    apart: bool = False


@dataclass(frozen=True)
class HeatMapRow:
    """One step of one case."""

    name: str
    step: str
    bad: bool
    again: bool
    blocks: tuple[Block, ...]
    data: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class HeatMap:
    """Everything that the page draws, and what it tells when asked about a cell."""

    examples: tuple[ExampleColumns, ...]
    rows: tuple[HeatMapRow, ...]

    @property
    def data(self) -> dict[str, Any]:
        """Of the tooltips: columns once, then the figures of every row."""
        columns = [[e.number, c.text, c.role] for e in self.examples for c in e.columns]
        return {"columns": columns, "rows": [row.data for row in self.rows]}


def heat_map(report: Report) -> HeatMap:
    """Lay out the judged cases. The responses of an example begin in the same column in every row."""
    steps = [(r, s) for r in report.cases if r.status == "judged" for s in r.steps]
    whole = not any(_prompts_trained(step) for _, step in steps)
    seen: dict[int, list[SequenceWeights]] = {}
    for _, step in steps:
        for row in step.sequences:
            seen.setdefault(row.example, []).append(row)
    examples = tuple(_example(number, seen[number], whole) for number in sorted(seen))
    rows = []
    for result, step in steps:
        blocks, cells = _blocks(examples, step, whole, result.case.ranks)
        many = len(result.steps) > 1
        bad = any(f.kind == "fault" for f in (*step.findings, *result.findings))
        told = f"step {step.index}" if many else ""
        name = visible(result.case.name)
        data = {
            "case": name,
            "step": told,
            "ranked": result.case.ranks > 1,
            "known": step.scale is not None,
            "cells": cells,
        }
        rows.append(HeatMapRow(name, told, bad, many and step is not result.steps[0], blocks, data))
    return HeatMap(examples, tuple(rows))


def shade(ratio: float, ideal: float, zero: float, error: float) -> str:
    """The class of a cell.

    ``z``: nothing where something was asked for; ``q``: nothing, as asked; ``x``: something where nothing was asked
    for; ``n``: negative; ``u``: not known; ``k0``: as asked; ``o1`` to ``o12``: more; ``l1`` to ``l12``: less.

    Args:
        zero: ratios up to this one are zero.
        error: ratios this near to one are one.
    """
    if not math.isfinite(ratio):
        return "u"
    if abs(ratio) <= zero:
        return "q" if ideal == 0 else "z"
    if ideal == 0:
        return "x"
    if ratio < 0:
        return "n"
    if abs(ratio - 1) <= error:
        return "k0"
    # A root draws small deviations out: 1.5% has a shade of its own, a factor of 2 lies in the middle.
    strength = min(1.0, abs(math.log(ratio)) / math.log(LARGEST)) ** 0.6
    level = round(SHADES * strength)
    return "k0" if level == 0 else f"{'o' if ratio > 1 else 'l'}{level}"


def _prompts_trained(step: StepResult) -> bool:
    zero = zero_bound(step)
    return any(abs(t.ratio) > zero for row in step.sequences for t in row.tokens if t.role == "prompt")


def _response_start(tokens: Sequence[TokenWeight]) -> int:
    return next((i for i, token in enumerate(tokens) if token.role in RESPONSE_ROLES), len(tokens))


def _example(number: int, rows: Sequence[SequenceWeights], whole: bool) -> ExampleColumns:
    """Columns of an example, as wide as its longest prompt and its longest response in any case."""
    fronts = [row.tokens[: _response_start(row.tokens)] for row in rows]
    backs = [row.tokens[_response_start(row.tokens) :] for row in rows]
    front, back = max(fronts, key=len), max(backs, key=len)
    if whole and front:
        text = visible("".join(t.text for t in front))
        columns = [TokenColumn("", f"{text} ({len(front)} tokens)", "prompt")]
    else:
        columns = [_column(token) for token in front]
    asked = len(columns)
    columns += [_column(token) for token in back]
    trained = sum(t.role in RESPONSE_ROLES for t in back)
    return ExampleColumns(number + 1, tuple(columns), asked, trained)


def _column(token: TokenWeight) -> TokenColumn:
    text = visible(token.text)
    return TokenColumn(text if len(text) == 1 and not text.isspace() else "▫", text, token.role)


def _blocks(
    examples: Sequence[ExampleColumns], step: StepResult, whole: bool, ranks: int
) -> tuple[tuple[Block, ...], list[Any]]:
    """The examples of one step, and the figures of its cells: per column [ratio, weight, ideal, where, copies]."""
    blocks, cells = [], []
    before: tuple[int | None, int | None] | None = None
    for example in examples:
        copies = [row for row in step.sequences if row.example + 1 == example.number]
        if not copies:
            blocks.append(Block(("e",) * len(example.columns), apart=True))
            cells.append(None)
            before = None
            continue
        at = (copies[0].rank, copies[0].micro_batch)
        tokens = _merge([_aligned(row, example, whole) for row in copies])
        shades = tuple(
            "e" if t is None else shade(t[0], t[2], zero_bound(step), max(0.005, step.error)) for t in tokens
        )
        begins = at != before
        blocks.append(Block(shades, begins, _label(*at, ranks) if begins else "", at[1] is None))
        before = at
        where = "; ".join(dict.fromkeys(place(row.rank, row.micro_batch, ranks) for row in copies))
        cells.append({"at": where, "copies": len(copies), "tokens": [t and [_short(v) for v in t] for t in tokens]})
    return tuple(blocks), cells


def _aligned(row: SequenceWeights, example: ExampleColumns, whole: bool) -> list[TokenWeight | None]:
    """The tokens of a row, one a column of its example."""
    start = _response_start(row.tokens)
    front: list[TokenWeight | None] = list(row.tokens[:start])
    if whole and front:
        front = [max((t for t in front if t is not None), key=lambda t: abs(t.ratio))]
    back: list[TokenWeight | None] = list(row.tokens[start:])
    wide = len(example.columns) - example.asked
    return [None] * (example.asked - len(front)) + front + back + [None] * (wide - len(back))


def _merge(copies: Sequence[Sequence[TokenWeight | None]]) -> list[tuple[float, float, float] | None]:
    """(ratio, weight, ideal) a column; of rows that stand in a step more than once the mean."""
    merged: list[tuple[float, float, float] | None] = []
    for tokens in zip(*copies, strict=True):
        found = [t for t in tokens if t is not None]
        if not found:
            merged.append(None)
            continue
        sums = [sum(values) / len(found) for values in zip(*((t.ratio, t.weight, t.ideal) for t in found), strict=True)]
        merged.append((sums[0], sums[1], sums[2]))
    return merged


def _label(rank: int | None, micro_batch: int | None, ranks: int) -> str:
    if micro_batch is None:
        return ""
    return f"{rank + 1}·{micro_batch + 1}" if ranks > 1 and rank is not None else f"{micro_batch + 1}"


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
