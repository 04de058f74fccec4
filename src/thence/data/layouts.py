"""The column layouts a data set may have, and how one row of each becomes an `Example`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from thence.data.example import Example, Message
from thence.data.fields import absent, need, text, wrong_type
from thence.data.messages import conversation, prompt_turns, read_tools, response_turn
from thence.data.numbers import number_text, without_separators
from thence.data.problems import RowProblem
from thence.errors import DataError

DataRow = Mapping[str, Any]
Parts = tuple[tuple[Message, ...] | str, Message | str | None, str | None]

FIELDS = (
    "messages",
    "conversations",
    "tools",
    "prompt",
    "completion",
    "question",
    "answer",
    "demonstration",
    "target",
    "reward_model",
    "text",
    "data_source",
)
UNREAD = {
    "system": "write it into the messages as a system turn, or set data.system",
    "functions": "write them as a column tools",
    "documents": "write them into the messages",
    "chat_template_kwargs": "set data.template_variables in the recipe",
    "images": "thence trains on text only",
    "image": "thence trains on text only",
    "videos": "thence trains on text only",
    "audio": "thence trains on text only",
}
"""Columns that change what a row says, and that thence does not read, with what to do about them."""
LAYOUTS = ("messages", "prompt-completion", "question-answer", "verl", "text")

ANSWER_MARK = "####"
_CALCULATOR = re.compile(r"<<[^<>]*>>")


def choose_layout(fields: Collection[str], name: str) -> str:
    """The layout that the columns `fields` of the data set `name` fit.

    Raises:
        DataError: none fits; the message lists the columns found.
    """
    if not {"messages", "conversations"}.isdisjoint(fields):
        return "messages"
    if "prompt" in fields and not {"reward_model", "target"}.isdisjoint(fields):
        return "verl"
    if "prompt" in fields:
        return "prompt-completion"
    if {"question", "answer"} <= set(fields):
        return "question-answer"
    if "text" in fields:
        return "text"
    raise DataError(
        f"no layout fits the columns {', '.join(sorted(fields)) or '(none)'}",
        remedy="a data set needs messages, prompt (with completion or answer), question + answer, verl's prompt + "
        "target / reward_model, or text; name your columns, for example --data.columns question=problem",
        file=name,
    )


def answers_are_worked(head: Sequence[DataRow]) -> bool:
    """Whether most of a data set's first rows have answers like GSM8K's: working, then `#### 42`."""
    return 2 * sum(ANSWER_MARK in str(row.get("answer")) for row in head) > len(head)


def parse_row(
    layout: str, row: DataRow, *, source: str, group: str, worked: bool = False, strip_calculator: bool = True
) -> Example:
    """Turn one row into an `Example`.

    Args:
        layout: one of `LAYOUTS`.
        row: field name -> value.
        source: "file:line" of the row.
        group: the group of rows whose column `data_source` is absent or empty.
        worked: answers of the layout question-answer are GSM8K's: working, then the number after `####`.
        strip_calculator: remove GSM8K's calculator annotations `<<48/2=24>>`.

    Raises:
        RowProblem: a field is missing, empty, of the wrong type or not clean text.
    """
    worked = worked and layout == "question-answer"
    for column, remedy in UNREAD.items():
        if not absent(row.get(column)):
            raise RowProblem(
                column, "a column that thence does not read, and this row fills it", f"{remedy}; or remove the column"
            )
    side, demonstration, answer = _worked_row(row) if worked else _PARSERS[layout](row)
    if worked and strip_calculator and isinstance(demonstration, str):
        demonstration = _CALCULATOR.sub("", demonstration)
    named = row.get("data_source")
    messages, prompt = ((), side) if isinstance(side, str) else (side, None)
    turn = Message("assistant", demonstration) if isinstance(demonstration, str) else demonstration
    return Example(
        messages=messages,
        prompt=prompt,
        demonstration=None if turn is None else turn.content,
        answer=answer,
        source=source,
        group=named if isinstance(named, str) and named.strip() else group,
        reasoning="" if turn is None else turn.reasoning,
        tool_calls=() if turn is None else turn.tool_calls,
        tools=read_tools(row.get("tools")),
        columns=other_columns(row),
    )


def other_columns(row: DataRow) -> str:
    """What thence does not read of a row, as a JSON object; empty: nothing. What JSON has no word for is a text."""
    others = {name: value for name, value in row.items() if name not in (*FIELDS, *UNREAD) and not absent(value)}
    return json.dumps(others, default=str, ensure_ascii=False) if others else ""


def _messages_row(row: DataRow) -> Parts:
    field = "messages" if row.get("messages") is not None or row.get("conversations") is None else "conversations"
    found = conversation(row, field)
    return found.prompt, found.response, _answer(row.get("answer"), "answer")


def _prompt_completion_row(row: DataRow) -> Parts:
    return _prompt_side(row), _demonstration(row, "completion"), _answer(row.get("answer"), "answer")


def _question_answer_row(row: DataRow) -> Parts:
    turns = (Message("user", text(need(row, "question"), "question")),)
    return turns, _demonstration(row, "demonstration"), _answer(need(row, "answer"), "answer")


def _worked_row(row: DataRow) -> Parts:
    turns = (Message("user", text(need(row, "question"), "question")),)
    working = text(need(row, "answer"), "answer")
    _, mark, final = working.rpartition(ANSWER_MARK)
    final = without_separators(final.strip())
    if not mark or not final:
        raise RowProblem(
            "answer",
            f"no final answer after {ANSWER_MARK}, which most rows have",
            f"end the text with a line '{ANSWER_MARK} 42'",
        )
    return turns, _demonstration(row, "demonstration") or working, final


def _verl_row(row: DataRow) -> Parts:
    reward = row.get("reward_model")
    if reward is not None and not isinstance(reward, Mapping):
        raise wrong_type("reward_model", reward, "an object with ground_truth")
    truth = reward.get("ground_truth") if reward else None
    return _prompt_side(row), _demonstration(row, "target"), _answer(truth, "reward_model.ground_truth")


def _text_row(row: DataRow) -> Parts:
    return "", text(need(row, "text"), "text"), None


_PARSERS: dict[str, Callable[[DataRow], Parts]] = {
    "messages": _messages_row,
    "prompt-completion": _prompt_completion_row,
    "question-answer": _question_answer_row,
    "verl": _verl_row,
    "text": _text_row,
}


def _prompt_side(row: DataRow) -> tuple[Message, ...] | str:
    if isinstance(need(row, "prompt"), str):
        return text(row["prompt"], "prompt")
    return prompt_turns(row, "prompt")


def _demonstration(row: DataRow, field: str) -> Message | str | None:
    """The expert response in `field`: text, or a list of one assistant message; none if None or empty."""
    value = row.get(field)
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return text(value, field)
    return response_turn(row, field)


def _answer(value: object, field: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RowProblem(field, f"the answer is {value}", "give a finite number or text")
        return number_text(value)
    if not isinstance(value, str):
        raise wrong_type(field, value, "text or a number")
    return text(value, field).strip()
