"""Read data sets of any supported format and layout into `Example`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

from thence.data.example import Example
from thence.data.layouts import FIELDS, LAYOUTS, UNREAD, answers_are_worked, choose_layout, parse_row
from thence.data.problems import BadRow, RowProblem, refuse_mostly_bad
from thence.data.sources import DataTable, NumberedRow, open_table
from thence.errors import DataError, UserError

# Enough rows to see which columns a JSONL file has and whether its answers carry GSM8K's mark.
HEAD_ROWS = 64


def read_examples(
    paths_or_names: Sequence[str] | str,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    layout: str = "auto",
    limit: int | None = None,
    skip_bad: bool = False,
    strip_calculator: bool = True,
) -> tuple[list[Example], list[BadRow]]:
    """Read one or more data sets, in the order given.

    Args:
        paths_or_names: JSONL (.gz too) or Parquet files, folders, or Hugging Face hub names (`owner/name:config`).
        split: the split of folders and hub data sets.
        columns: field -> the data set's name for it, e.g. {"question": "problem"}; fields are `layouts.FIELDS`.
        layout: one of `layouts.LAYOUTS`, or "auto": found for each data set from its columns.
        limit: stop after so many examples in all.
        skip_bad: list bad rows instead of raising at the first one.
        strip_calculator: remove GSM8K's calculator annotations from demonstrations.

    Returns:
        The examples, and the bad rows left out (empty unless `skip_bad`).

    Raises:
        UserError: a setting makes no sense, or a data set cannot be found or loaded.
        DataError: a bad row without `skip_bad`; more than half of a data set's rows bad; a data set without rows.
    """
    _check_settings(columns, layout, limit)
    renames = dict(columns or {})
    wanted = {*FIELDS, *UNREAD, *renames.values()}
    names = [paths_or_names] if isinstance(paths_or_names, str) else list(paths_or_names)
    examples: list[Example] = []
    bad: list[BadRow] = []
    for name in names:
        left = None if limit is None else limit - len(examples)
        if left == 0:
            break
        table = open_table(name, split=split, wanted=wanted, others=True)
        more, worse = _read_table(table, renames, layout, left, skip_bad, strip_calculator)
        examples += more
        bad += worse
    return examples, bad


def _check_settings(columns: Mapping[str, str] | None, layout: str, limit: int | None) -> None:
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(
            f"unknown layout {layout!r}", remedy=f"use auto or one of {', '.join(LAYOUTS)}", field="data.layout"
        )
    unknown = sorted(set(columns or {}) - set(FIELDS))
    if unknown:
        raise UserError(
            f"unknown field {', '.join(unknown)}",
            remedy=f"columns are given as FIELD=COLUMN, with FIELD one of {', '.join(FIELDS)}",
            field="data.columns",
        )
    if limit is not None and limit < 1:
        raise UserError(f"a limit of {limit} reads nothing", remedy="give 1 or more, or none", field="data.limit")


def _read_table(
    table: DataTable, renames: dict[str, str], layout: str, limit: int | None, skip_bad: bool, strip_calculator: bool
) -> tuple[list[Example], list[BadRow]]:
    head = list(islice(table.rows, HEAD_ROWS))
    readable = [row for _, row in head if isinstance(row, dict)]
    columns = set(table.columns or ()) | {column for row in readable for column in row}
    chosen = _layout_of(table, head, columns, renames, layout)
    worked = answers_are_worked([_rename(row, renames) for row in readable])
    examples: list[Example] = []
    bad: list[BadRow] = []
    for number, row in chain(head, table.rows):
        if limit is not None and len(examples) == limit:
            break
        source = f"{table.name}:{number}"
        try:
            if isinstance(row, RowProblem):
                raise row
            fields = _rename(row, renames)
            example = parse_row(
                chosen, fields, source=source, group=table.group, worked=worked, strip_calculator=strip_calculator
            )
            examples.append(example)
        except RowProblem as problem:
            problem.field = _users_name(problem.field, renames)
            if not skip_bad:
                raise problem.error(source) from None
            bad.append(problem.bad_row(source))
    refuse_mostly_bad(
        table.name,
        len(examples),
        bad,
        remedy=f"check --data.layout (now {chosen}) and --data.columns",
    )
    return examples, bad


def _layout_of(
    table: DataTable, head: list[NumberedRow], columns: set[str], renames: dict[str, str], layout: str
) -> str:
    if not columns:
        raise _nothing_readable(table, head)
    absent = sorted(set(renames.values()) - columns)
    if absent:
        raise DataError(
            f"no column {', '.join(absent)}; found {', '.join(sorted(columns))}",
            remedy="columns are given as FIELD=COLUMN: correct the COLUMN side",
            file=table.name,
            field="data.columns",
        )
    fields = set(_rename(dict.fromkeys(columns), renames))
    chosen = layout if layout != "auto" and not fields.isdisjoint(FIELDS) else choose_layout(fields, table.name)
    if not head:
        raise _no_rows(table)
    return chosen


def _nothing_readable(table: DataTable, head: list[NumberedRow]) -> DataError:
    """The error for a data set that shows no column at all: its first row's own problem says more than a summary."""
    if not head:
        return _no_rows(table)
    number, first = head[0]
    problem = first if isinstance(first, RowProblem) else RowProblem(None, "an empty object", "give the row its fields")
    return problem.error(f"{table.name}:{number}")


def _no_rows(table: DataTable) -> DataError:
    return DataError("holds no rows", remedy="give a data set with at least one row", file=table.name)


def _rename(row: Mapping[str, Any], renames: dict[str, str]) -> dict[str, Any]:
    taken = set(renames.values())
    fields = {column: value for column, value in row.items() if column not in taken}
    return fields | {field: row[column] for field, column in renames.items() if column in row}


def _users_name(field: str | None, renames: dict[str, str]) -> str | None:
    """The field as the data set calls it: `question` -> `problem`, `messages[0].role` -> `turns[0].role`."""
    if field is None:
        return None
    own = next((ours for ours in renames if field == ours or field.startswith((f"{ours}[", f"{ours}."))), None)
    return field if own is None else renames[own] + field[len(own) :]
